"""Faults of PostgreSQL."""

from __future__ import annotations

import os
import random
import signal
import time
from uuid import uuid4

import psycopg

from tests.faults.fault import fault
from tests.faults.place import Place, last, until

REFUSE_WITHIN_S = 3.0
"""Promised while PostgreSQL is away."""


@fault("all sessions of PostgreSQL terminated")
def end_sessions(place: Place, _: random.Random) -> None:
    for _ in range(3):
        with place.database(superuser=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename = 'sutazai' AND pid <> pg_backend_pid()"
            )
        last(0.3)


@fault("kill -9 of a session's process, so that PostgreSQL recovers")
def kill_session(place: Place, chance: random.Random) -> None:
    with place.database(superuser=True) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE usename = 'sutazai'"
        ).fetchall()
    os.kill(chance.choice(found)[0], signal.SIGKILL)


@fault("immediate stop and restart of PostgreSQL", is_long=True)
def stop_database(place: Place, _: random.Random) -> None:
    stop_at_once(place)


@fault("three immediate stops and restarts of PostgreSQL in a row")
def stop_database_again(place: Place, chance: random.Random) -> None:
    charged = place.value(_CHARGED)
    for _ in range(3):
        stop_at_once(place)
        last(chance.uniform(0.2, 1.0))
    assert place.value(_CHARGED) == charged, "tasks were charged for an outage"


_CHARGED = "SELECT coalesce(sum(failures + crashes), 0) FROM tasks"


def stop_at_once(place: Place) -> None:
    """Stop PostgreSQL as fast as it can be; return when tasks are accepted again."""
    server = place.process("postgresql")
    server.send_signal(signal.SIGQUIT)  # its immediate shutdown
    server.wait(20)

    def accepts() -> bool:
        asked_at = time.monotonic()
        answer = place.post("work", str(uuid4()))
        took_s = time.monotonic() - asked_at
        assert took_s < REFUSE_WITHIN_S
        if answer.status_code == 202:
            return True
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
        place.note("refusing while PostgreSQL was away", took_s)
        return False

    until(accepts, 20, "tasks are accepted again")


@fault("a locked table")
def lock_table(place: Place, _: random.Random) -> None:
    with place.database(superuser=True) as connection, connection.transaction():
        connection.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
        last(3)


@fault("PostgreSQL in read-only mode")
def make_read_only(place: Place, _: random.Random) -> None:
    def switch(mode: str) -> None:
        with place.database(superuser=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER DATABASE sutazai SET default_transaction_read_only = {mode}")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename = 'sutazai' AND pid <> pg_backend_pid()"
            )

    switch("on")
    last(3)
    switch("off")


@fault("all connections of PostgreSQL used up")
def use_up_connections(place: Place, _: random.Random) -> None:
    held = []
    url = place.env["SUTAZAI_DATABASE_URL"]
    with place.database(superuser=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE usename = 'sutazai' AND state = 'idle'"
        )
    try:
        while len(held) < 1000:
            held.append(psycopg.connect(url, connect_timeout=2))
    except psycopg.OperationalError:
        pass  # there are no more
    last(3)
    for connection in held:
        connection.close()
