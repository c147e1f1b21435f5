"""One run of one fault: load, injection, healing, judgement."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from tests.faults.catalogue import Fault
from tests.faults.checker import Verdict, check
from tests.faults.load import Load
from tests.faults.place import Place, until

WHOLE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Run:
    """What one injection showed."""

    fault: Fault
    seed: int
    verdict: Verdict
    unexplained: list[str]
    notes: dict[str, float] = field(default_factory=dict)


def run(place: Place, fault: Fault, seed: int, *, before_s: float, after_s: float) -> Run:
    """Inject a fault while tasks come in, let it heal, and judge; the same seed does the same.

    before_s, after_s: how long the load lasts before the injection and after the healing.
    """
    place.notes.clear()
    until(place.is_whole, WHOLE_WITHIN_S, "the system is healthy before the fault")
    chance = random.Random(seed)
    with Load(place, seed) as load:
        time.sleep(before_s * chance.uniform(0.5, 1.0))
        fault.inject(place, chance)
        healed_at = place.value("SELECT now()")
        time.sleep(after_s)
    verdict = check(place, load.log, healed_at)
    until(place.is_whole, WHOLE_WITHIN_S, "the system is healthy after the fault")
    return Run(fault, seed, verdict, load.log.unexplained, dict(place.notes))
