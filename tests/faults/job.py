"""A process that injects one fault after another, beside others with systems of their own."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from queue import Empty
from typing import Any

from tests.faults.catalogue import FAULTS, Fault
from tests.faults.place import Places
from tests.faults.run import Run, run

STOP_WITHIN_S = 120.0
"""A system that drains, and servers that stop, take less."""

_LOOK_EACH_S = 1.0


@dataclass(frozen=True)
class Plan:
    """What is done with each fault."""

    runs: int
    seconds: float
    seed: int

    def seed_of(self, fault: Fault) -> int:
        """Return a fault's own seed, which does not depend on what else is injected."""
        return random.Random(f"{self.seed} {fault.name}").randrange(1_000_000)


def run_all(faults: Sequence[Fault], plan: Plan, jobs: int) -> Generator[Run | str, None, None]:
    """Inject faults into so many systems side by side; yield what they show and how it goes.

    Whatever ends it, every process that was started is stopped.
    """
    busy = [fault for fault in faults if fault.is_busy]
    # The long ones first: else everybody waits for the last one of them.
    others = sorted((fault for fault in faults if not fault.is_busy), key=lambda it: not it.is_long)
    yield from _run_all(busy, plan, 1)
    yield from _run_all(others, plan, jobs)


def _run_all(faults: Sequence[Fault], plan: Plan, jobs: int) -> Iterator[Run | str]:
    spawn = multiprocessing.get_context("spawn")
    waiting, shown = spawn.Queue(), spawn.Queue()
    for fault in faults:
        waiting.put(fault.name)
    workers = []
    try:
        for _ in range(min(jobs, len(faults))):
            waiting.put(None)
            workers.append(spawn.Process(target=_work, args=(plan, waiting, shown)))
            workers[-1].start()
        yield from _listen(workers, shown)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(STOP_WITHIN_S)


def _listen(workers: Sequence[SpawnProcess], shown: Any) -> Iterator[Run | str]:
    while True:
        is_over = not any(worker.is_alive() for worker in workers)
        try:
            yield shown.get(timeout=_LOOK_EACH_S)
        except Empty:
            if is_over:
                return


def _work(plan: Plan, waiting: Any, shown: Any) -> None:
    # Ctrl-C reaches every process of the terminal; the first one tells the others, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    known = {fault.name: fault for fault in FAULTS}
    places = Places()
    try:
        while (name := waiting.get()) is not None:
            shown.put(_inject(places, known[name], plan, shown.put))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        places.discard()


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _inject(places: Places, fault: Fault, plan: Plan, tell: Any) -> Run:
    """Inject one fault; a system that broke is replaced before the next."""
    seed = plan.seed_of(fault)
    try:
        place = places.of(fault.kind)
    except Exception as error:
        places.discard()
        return Run(fault.name, seed, fault.pause_s, errors=[f"no system to inject into: {error!r}"])
    done = run(place, fault, seed, runs=plan.runs, seconds=plan.seconds, tell=tell)
    if not done.is_good:
        places.discard()
    return done
