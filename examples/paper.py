"""The paper's run as a run file in Python: pairs in S3, 1,024 GPUs for the prior.

tapir submit examples/paper.py --to slurm --dry-run
"""

GPUS_A_NODE = 8
PIXELS = 256
"""Side of the dVAE's pictures: the token job leaves out what is smaller, so pack does first."""

run = {
    "name": "paper",
    "out": "/shared/runs/paper",
    "store": "s3://pairs/paper",
    "stages": {
        "pack": {
            "source": "/shared/pairs",
            "workers": 64,
            "cpus": 4,
            "flags": {
                "threads": 4,
                "validation": 0.001,
                "max_rejects": 0.05,
                "min_words": 3,
                "english": True,
                "boilerplate": True,
                "aspect": 2,
                "min_side": PIXELS,
            },
        },
        "bpe": {"preset": "paper_bpe", "cpus": 32},
        "dvae": {"preset": "paper_dvae", "nodes": 8, "gpus": GPUS_A_NODE, "cpus": 96},
        "tokenize": {"workers": 256, "parallelism": 128, "gpus": 1, "cpus": 12},
        "prior": {
            "preset": "paper_12b",
            "nodes": 1024 // GPUS_A_NODE,
            "gpus": GPUS_A_NODE,
            "cpus": 96,
            "minutes": 1440,
            "flags": {"checkpoint.keep_every_hours": 12},
        },
    },
    "slurm": {"partition": "gpu", "warn_seconds": 600},
}
