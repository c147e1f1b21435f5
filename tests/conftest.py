"""The services that tests need: a private PostgreSQL and Valkey, started once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import text

from sutazai import db, embedded, migration, redis
from sutazai.embedded import child
from sutazai.models import metadata
from sutazai.settings import override
from sutazai.tasks import load
from tests.rabbitmq import Node, is_installed

# Every run tries the same inputs; `pytest --hypothesis-profile explore` tries new ones.
_COMMON = {
    "deadline": None,  # a busy machine is no fault of the input
    "database": None,  # nothing is written into the tree
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,  # one front serves every example of a test
    ],
}
settings.register_profile("steady", derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=1000, **_COMMON)
settings.load_profile("steady")


@dataclass(frozen=True)
class Servers:
    """Where the servers of this test session are."""

    home: Path
    database_url: str
    broker_url: str
    redis_url: str


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Start a private PostgreSQL and Valkey, and stop them when the session ends."""
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="sutazai-", dir="/tmp"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        env = embedded.prepare(home, free_port(), free_port())
        for program in embedded.server_programs(home):
            stack.enter_context(started(home, program))
        embedded.wait_for_servers(env)
        yield Servers(
            home,
            env["SUTAZAI_DATABASE_URL"],
            env["SUTAZAI_BROKER_URL"],
            env["SUTAZAI_REDIS_URL"],
        )


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[Node]:
    """Start a private RabbitMQ; where it is not installed, skip at home and fail in CI."""
    if not is_installed():
        absent = "RabbitMQ is not installed: apt-get install rabbitmq-server"
        pytest.fail(absent) if os.environ.get("CI") else pytest.skip(absent)
    folder = Path(tempfile.mkdtemp(prefix="sutazai-", dir="/tmp"))
    try:
        with Node(folder, free_port(), free_port(), free_port()) as node:
            yield node
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(home: Path, program: embedded.Program) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that is executed, without a supervisor; it ends with us in any case."""
    with embedded.Layout(home).log(program.name).open("ab") as log:
        process = subprocess.Popen(
            program.argv,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for pytest, which stops the servers in order
            preexec_fn=partial(child.reset, program, os.getpid()),  # noqa: PLW1509 - no threads yet
        )
    try:
        yield process
    finally:
        process.send_signal(program.stop_signal)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session", autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests apart from whatever is configured or runs on this machine."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("SUTAZAI_")}
    for name in kept:
        del os.environ[name]
    override(home=str(tmp_path_factory.mktemp("home")))
    yield
    os.environ.update(kept)


@pytest.fixture(scope="session")
def migrated(servers: Servers, _own_settings: None) -> Servers:
    """Point the settings to the private servers, and make the tables."""
    override(
        home=str(servers.home),
        database_url=servers.database_url,
        broker_url=servers.broker_url,
        redis_url=servers.redis_url,
    )
    migration.migrate()
    return servers


@pytest.fixture
def database(migrated: Servers) -> Iterator[Servers]:
    """Give a test empty tables and an empty Redis."""
    load()  # agents add tables of their own
    names = ", ".join(table.name for table in metadata.sorted_tables)
    with db.transaction() as connection:
        connection.execute(text(f"TRUNCATE {names}"))
    redis.attempt(lambda client: client.flushall())
    yield migrated
    db.dispose()
