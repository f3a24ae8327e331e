"""The token job: dVAE codes and text ids, computed once, in a job of any number of workers."""
