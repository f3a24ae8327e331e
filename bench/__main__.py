"""`python -m bench NAME [--json]`: run one benchmark and print its rows."""

import argparse
import importlib
import json
import os
import platform
import sys

NAMES = (
    *(
        "attention",
        "bpe",
        "compression",
        "dvae",
        "engines",
        "goodput",
        "gpu",
        "loader",
        "network",
        "order",
    ),
    *("parity", "plan", "profile", "sampling", "saving", "scales", "stream", "train_step"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("name", choices=NAMES, help="which benchmark")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line"
    )
    gpu = parser.add_argument_group("of gpu alone")
    gpu.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a dry run (cuda)")
    gpu.add_argument("--tiny", action="store_true", default=None, help="small sizes")
    gpu.add_argument("--out", help="folder for the rows ($OUT, else runs/gpu)")
    gpu.add_argument("--only", help="names of sections, with commas between them")
    gpu.add_argument("--budget", type=float, help="seconds of all sections together (420)")
    chosen = parser.parse_args()
    names = ("device", "tiny", "out", "only", "budget")
    flags = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    if flags and chosen.name != "gpu":
        parser.error(f"{', '.join(f'--{name}' for name in flags)} belong to gpu")
    rows = importlib.import_module(f"bench.{chosen.name}").run(**flags)
    for row in rows:
        low, high = row["spread"]
        print(
            f"{row['name']:<40} {row['value']:>10.4g} {row['unit']}  "
            f"{row['ratio']:.2f}x of {row['baseline']} [{low:.2f}, {high:.2f}]",
            file=sys.stderr,
        )
    if chosen.json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine()}
        print(json.dumps({"bench": chosen.name, "rows": rows, "machine": machine}))


if __name__ == "__main__":
    main()
