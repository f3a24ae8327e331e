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
    chosen = parser.parse_args()
    rows = importlib.import_module(f"bench.{chosen.name}").run()
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
