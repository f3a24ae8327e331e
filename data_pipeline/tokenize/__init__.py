"""The token job: dVAE codes and text ids, computed once by any number of workers.

Start: worker.py: a worker of the job; encode.py: what it computes.
Imports: data_pipeline's jobs, formats, images and text, models, parallel, core.
"""
