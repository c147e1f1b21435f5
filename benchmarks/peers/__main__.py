"""Measure one peer and print what was found as one line of JSON."""

import argparse
import dataclasses
import json
import sys

from benchmarks.peers.peer import CARDS, measure


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("name", choices=[card.name for card in CARDS])
    parser.add_argument("--tasks", type=int, default=0)
    parser.add_argument("--trips", type=int, default=0)
    parser.add_argument("--output", required=True, help="where the line is written")
    options = parser.parse_args()
    # Some peers take the program's name for that of the task's module.
    sys.argv[:] = [f"benchmarks.peers.{options.name}"]
    [card] = [card for card in CARDS if card.name == options.name]
    figures = measure(card.make(), options.tasks, options.trips)
    with open(options.output, "w") as output:  # noqa: PTH123
        json.dump(dataclasses.asdict(figures), output)


if __name__ == "__main__":
    main()
