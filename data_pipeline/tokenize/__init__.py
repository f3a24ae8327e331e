"""The token job: dVAE codes and text ids, computed once by any number of workers.

Start: worker.py: a worker; leases.py: task leases.
Imports: data_pipeline's formats, images and text, models, parallel, core.
"""
