"""The token job: dVAE codes and text ids, computed once, by any number of workers.

Start: worker.py: one worker; leases.py: who works on what.
Imports: data_pipeline's formats, images and text, models, parallel, core.
"""
