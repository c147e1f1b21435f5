"""Each fault once, with a short load; `make fault` injects each many times."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.faults.catalogue import FAULTS, Fault
from tests.faults.place import Place
from tests.faults.run import run

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

SHORT = [fault for fault in FAULTS if not fault.is_long]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    opened = Place.open(tmp_path_factory.mktemp("fault") / ".sutazai")
    yield opened
    assert opened.close() == 0


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_nothing_is_lost_or_doubled(place: Place, fault: Fault) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")  # noqa: T201 - to be replayed
    done = run(place, fault, seed, before_s=1.0, after_s=0.5)
    assert done.verdict.is_good, (seed, done.verdict, done.unexplained)
