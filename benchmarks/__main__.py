"""Measure the product and its peers on this machine, and write benchmarks/results.md."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import benchmarks.measurements  # noqa: F401 - registers them
from benchmarks.limits import raise_open_files
from benchmarks.machine import sync_ms
from benchmarks.measurement import Finding, Measurement, Run, registered
from benchmarks.plots import draw
from benchmarks.report import Place, peers, report, section, targets
from benchmarks.stores import stores

REPORT = Path(__file__).parent / "results.md"


def main(arguments: Sequence[str]) -> int:
    """Run what is wanted; 1 when something could not be measured, 130 after Ctrl-C."""
    known = registered()
    options = _parse(arguments, list(known))
    if options.list:
        for each in known.values():
            _say(f"{each.name:8}  {'; '.join(target.what for target in each.targets)}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    raise_open_files()
    folder = Path(tempfile.mkdtemp(prefix="sutazai-bench-", dir="/tmp"))
    folder.chmod(0o755)  # the servers' own user passes through
    found: dict[str, Finding] = {}
    faults: dict[str, str] = {}
    wanted = [known[name] for name in known if not options.only or name in options.only]
    try:
        with stores(folder) as own:
            place = Place(own.versions, sync_ms(folder))
        for each in wanted:
            run = Run(options.rounds, options.quick, folder, lambda line: _say(f"    {line}"))
            _measure(each, run, found, faults)
    except KeyboardInterrupt:
        _say("Stopped.")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.only or options.quick:
        _print(found, known)
    else:
        REPORT.write_text(report(found, faults, known, options.rounds, place))
        for finding in found.values():
            for chart in finding.charts:
                draw(chart, REPORT.parent)
        _say(f"Wrote {REPORT} and its plots.")
    return 1 if faults else 0


def _parse(arguments: Sequence[str], names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help="only these; prints, no report"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured")
    parser.add_argument("--quick", action="store_true", help="small sizes; prints, no report")
    parser.add_argument("--list", action="store_true", help="name the measurements")
    return parser.parse_args(arguments)


def _measure(
    each: Measurement, run: Run, found: dict[str, Finding], faults: dict[str, str]
) -> None:
    _say(f"{each.name} …")
    began = time.monotonic()
    try:
        found[each.name] = each.measure(run)
    except Exception as error:
        faults[each.name] = f"{type(error).__name__}: {error}"
        _say(f"{each.name} could not be measured: {faults[each.name][:2000]}")
    else:
        _say(f"{each.name} took {time.monotonic() - began:.0f} s")


def _print(found: dict[str, Finding], known: dict[str, Measurement]) -> None:
    lines = ["", *targets(found)]
    compared = [line for finding in found.values() for line in finding.peers]
    if compared:
        lines += ["", *peers(compared)]
    for name, finding in found.items():
        lines += ["", *section(known[name], finding)]
    _say("\n".join(lines))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
