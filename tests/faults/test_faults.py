"""Each fault once, with a short load; `make fault` injects each many times."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.catalogue import FAULTS, Fault
from tests.faults.place import Kind, Places
from tests.faults.run import run

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

# By kind, so that each kind of place is opened once.
SHORT = [fault for kind in Kind for fault in FAULTS if fault.kind is kind and not fault.is_long]


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    opened = Places()
    yield opened
    assert opened.close() == 0


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_nothing_is_lost_or_doubled(places: Places, fault: Fault) -> None:
    if missing := fault.missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"missing: {missing}")
        pytest.skip(f"missing: {missing}")
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}")  # noqa: T201 - to be replayed
    done = run(places.of(fault.kind), fault, seed, runs=1, seconds=1.0)
    if not done.is_good:
        places.discard()  # the next fault is not to suffer from this one
    assert done.is_good, (str(done), done.unexplained)
