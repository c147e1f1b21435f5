"""Ids."""

from __future__ import annotations

import os
from uuid import UUID

from sutazai.models import new_id

CHANCE = (1 << 62) - 1


def test_ids_keep_the_order_in_which_they_were_made() -> None:
    ids = [new_id() for _ in range(1000)]
    assert sorted(ids, key=lambda each: each.int >> 64) == ids
    assert {(each.version, each.variant) for each in ids} == {(7, UUID(int=1 << 63).variant)}
    assert len({each.int & CHANCE for each in ids}) == len(ids)


def test_a_forked_process_makes_ids_of_its_own() -> None:
    new_id()  # there is chance in store
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writing, b"".join(new_id().bytes for _ in range(100)))
        finally:
            os._exit(0)
    own = {new_id().int & CHANCE for _ in range(100)}
    os.waitpid(child, 0)
    raw = os.read(reading, 100 * 16)
    os.close(reading)
    os.close(writing)
    other = {int.from_bytes(raw[at : at + 16]) & CHANCE for at in range(0, len(raw), 16)}
    assert len(own) == len(other) == 100
    assert not own & other
