"""The stores that peers are measured on: a private PostgreSQL and Valkey like the system's own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

from sutazai import embedded
from tests.conftest import free_port, started

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stores:
    """Where they are; peers are given these as environment."""

    folder: Path
    database_url: str
    broker_url: str

    @property
    def results_url(self) -> str:
        """Return another database of the same Valkey."""
        return self.broker_url.removesuffix("/0") + "/1"

    @property
    def superuser_url(self) -> str:
        """Return the database's address for its superuser."""
        return superuser_url(self.folder, self.database_url)

    @property
    def environment(self) -> dict[str, str]:
        """Return what peers find the stores by (benchmarks/peers/address.py)."""
        kept = {name: value for name, value in os.environ.items() if "SUTAZAI" not in name}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "BENCH_DATABASE_URL": self.database_url,
            "BENCH_BROKER_URL": self.broker_url,
            "BENCH_RESULTS_URL": self.results_url,
            "FLOWER_UNAUTHENTICATED_API": "true",
        }

    @property
    def versions(self) -> list[str]:
        """Return what the servers say they are."""
        valkey = redis.Redis.from_url(self.broker_url).info("server")
        with psycopg.connect(self.database_url) as connection:
            version = connection.info.parameter_status("server_version")
        return [f"PostgreSQL {version}", f"Valkey {valkey['valkey_version']}"]

    def clear(self) -> None:
        """Empty both, so that every peer finds them new."""
        redis.Redis.from_url(self.broker_url).flushall()
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    @contextmanager
    def started(self, command: Sequence[str], name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a program on the stores until the block ends, with all that it starts itself."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            end_group(process)


def superuser_url(home: Path, url: str) -> str:
    """Return a database's address for the superuser of a home's PostgreSQL."""
    known = json.loads((home / "credentials.json").read_text())
    return f"postgresql://postgres:{known['superuser']}@{url.split('@', 1)[1]}"


def end_group(process: subprocess.Popen[bytes], within_s: float = 15.0) -> None:
    """Ask a process to end, then kill what is left of its group."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(within_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextmanager
def stores(folder: Path) -> Iterator[Stores]:
    """Start the stores, and stop them when the block ends."""
    home = folder / f"stores-{time.monotonic_ns()}"
    with ExitStack() as stack:
        env = embedded.prepare(home, free_port(), free_port())
        for program in embedded.server_programs(home):
            stack.enter_context(started(home, program))
        embedded.wait_for_servers(env)
        yield Stores(home, env["SUTAZAI_DATABASE_URL"], env["SUTAZAI_BROKER_URL"])
