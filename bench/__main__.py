"""`python -m bench NAME [--json]`: run one benchmark and print its rows."""

import argparse
import json
import os
import platform
import sys

from bench import (
    attention,
    compression,
    engines,
    goodput,
    loader,
    network,
    order,
    parity,
    saving,
    scales,
    stream,
)

BENCHES = {
    "attention": attention.run,
    "compression": compression.run,
    "engines": engines.run,
    "goodput": goodput.run,
    "loader": loader.run,
    "network": network.run,
    "order": order.run,
    "parity": parity.run,
    "saving": saving.run,
    "scales": scales.run,
    "stream": stream.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("name", choices=sorted(BENCHES), help="which benchmark")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line"
    )
    chosen = parser.parse_args()
    rows = BENCHES[chosen.name]()
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
