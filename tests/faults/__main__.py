"""The fault suite at length, as `make fault` runs it; it writes docs/faults.md.

What it shows of a fault is kept in record.json as soon as it is shown, if it is long enough.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from tests.faults.catalogue import FAULTS, Fault
from tests.faults.job import Plan, run_all
from tests.faults.place import Kind
from tests.faults.record import RUNS, SECONDS, keep, recorded
from tests.faults.report import report
from tests.faults.run import Run

REPORT = Path(__file__).parents[2] / "docs" / "faults.md"


def main(arguments: Sequence[str]) -> int:
    """Run the suite; return 1 when a promise was broken, or a fault is missing where CI is set."""
    options = _parse(arguments)
    wanted = [fault for kind in Kind for fault in FAULTS if fault.kind is kind]
    if options.only:
        wanted = [fault for fault in wanted if any(part in fault.name for part in options.only)]
    left_out = {fault.name: missing for fault in wanted if (missing := fault.missing())}
    chosen = [fault for fault in wanted if fault.name not in left_out]
    for name, why in left_out.items():
        _say(f"not injected: {name}; missing: {why}")
    if not chosen:
        _say(f"No fault to inject is named like {' or '.join(options.only) or 'any'}.")
        return 2
    plan = Plan(options.runs, options.seconds, options.seed)
    _say(
        f"seed {plan.seed}: {len(chosen)} faults, {plan.runs} injections of each "
        f"into {plan.seconds:g} s of load or more, {options.jobs} systems side by side"
    )
    runs = _run(chosen, plan, options.jobs)
    is_good = all(done.is_good for done in runs)
    return 0 if is_good and not (left_out and os.environ.get("CI") == "true") else 1


def _run(chosen: Sequence[Fault], plan: Plan, jobs: int) -> list[Run]:
    """Return what was shown, in the order of the catalogue."""
    found: dict[str, Run] = {}
    with closing(run_all(chosen, plan, jobs)) as shown:
        for one in shown:
            _say(str(one))
            if isinstance(one, Run):
                found[one.fault] = one
                for line in one.unexplained[:5]:
                    _say(f"    {line}")
                if plan.runs >= RUNS and plan.seconds >= SECONDS:
                    # At once: a run of hours may be stopped, and goes on later with the rest.
                    keep(one)
                    REPORT.write_text(report(recorded(), [each.name for each in FAULTS], _place()))
    return [found.get(fault.name) or _unfinished(fault, plan) for fault in chosen]


def _unfinished(fault: Fault, plan: Plan) -> Run:
    done = Run(
        fault.name,
        plan.seed_of(fault),
        fault.pause_s,
        errors=["the process that injected it has ended"],
    )
    _say(str(done))
    return done


def _place() -> str:
    versions = f"Python {platform.python_version()}, Celery {version('celery')}"
    return f"{versions}, {os.cpu_count()} cores, PostgreSQL and Valkey from the wheels."


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help="times each fault is injected")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="load around it, at least")
    parser.add_argument("--jobs", type=int, default=1, help="systems side by side")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument(
        "--only", nargs="+", default=(), help="faults whose name contains one of these"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a Ctrl-C does
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
