"""What one task costs in statements, commits and Redis commands: counted, so no clock matters.

A real front and a real worker run; PostgreSQL logs every statement, and Valkey every command. What
is driven by time (heartbeats, leases, the slow poll behind the signals) is not a task's cost.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest
import redis

from sutazai import admission, db, statements
from sutazai.bell import TOGETHER_MAX, Pace
from sutazai.embedded import Layout
from sutazai.submission import Submission
from tests.conftest import Servers, free_port
from tests.integration.pools import prefork
from tests.integration.served import until

AGENT = prefork.name
NAP = prefork.get("nap")
TASKS = 20


@dataclass
class Statement:
    """One statement that PostgreSQL has run."""

    session: str
    sql: str
    parameters: str = ""
    in_transaction: bool = False

    @property
    def verb(self) -> str:
        """Which of the platform's statements it is; unknown ones are told by their text."""
        flat = " ".join(self.sql.split())
        return next((verb for verb, sign in _SIGNS.items() if sign in flat), flat)


_SIGNS = {
    "accept": "INSERT INTO tasks (",
    "claim": "UPDATE tasks SET state = 'running'",
    "finish": "INSERT INTO attempts",
    "read": "SELECT task_id, action, state, result, error FROM tasks",
    "show": "SELECT task_id, agent, action, state, priority, params, result",
    "position": "LIMIT $",
    # Driven by time: the slow poll behind the signals, and the leases of what runs long.
    "poll": "AND finished_at IS NOT NULL",
    "extend": "UPDATE tasks SET lease_expires_at",
}
_BY_TIME = {"poll", "extend"}


class Log:
    """What PostgreSQL writes while it logs every statement."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size

    def statements(self) -> list[Statement]:
        """Return what has run since, in order."""
        with self._path.open(errors="replace") as file:
            file.seek(self._start)
            text = file.read()
        found: list[Statement] = []
        open_sessions: set[str] = set()
        for session, kind, body in _ENTRY.findall(text):
            if kind == "DETAIL" and found and found[-1].session == session:
                found[-1].parameters = body
                continue
            said = _STATEMENT.match(body)
            if kind != "LOG" or said is None:
                continue
            sql = said[1].strip()
            if sql.upper().startswith("BEGIN"):
                open_sessions.add(session)
            found.append(Statement(session, sql, in_transaction=session in open_sessions))
            if sql.upper().startswith(("COMMIT", "ROLLBACK")):
                open_sessions.discard(session)
        return found


_ENTRY = re.compile(r"^\S+ \S+ UTC \[(\d+)\] (\w+):  (.*(?:\n\t.*)*)", re.MULTILINE)
_STATEMENT = re.compile(r"(?:statement|execute [^:]+): ((?:.|\n)*)")


_NOT_OF_TASKS = {"AUTH", "CLIENT", "HELLO", "PING", "SELECT", "LLEN", "HGETALL"}
"""Commands of new connections, and of what is measured once a second."""


@dataclass
class Commands:
    """What Valkey was told, from a connection that monitors it."""

    url: str
    said: list[str] = field(default_factory=list)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather all commands until the block ends."""
        client = redis.Redis.from_url(self.url)
        end = f"the end of {id(self)}"
        with client.monitor() as monitor:

            def listen() -> None:
                for command in monitor.listen():
                    if end in command["command"]:
                        return
                    if command["client_type"] != "lua":  # what a script does is not sent
                        self.said.append(command["command"])

            thread = threading.Thread(target=listen)
            thread.start()
            try:
                yield
            finally:
                client.echo(end)
                thread.join(30)
        assert not thread.is_alive()

    def names(self, word: str = "") -> list[str]:
        """Return the names of the commands that hold a word."""
        return [said.split(" ", 1)[0].upper() for said in self.said if word in said]


@dataclass(frozen=True)
class Place:
    """A front and a worker as processes of their own, and what the stores were told."""

    client: httpx.Client
    servers: Servers

    def trip(self) -> str:
        """Hand over a task and wait for its result; return its id."""
        body = {"action": "nap", "seconds": 0}
        answer = self.client.post("/process", json=body, headers={"Prefer": "wait=60"})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["task_id"])


@pytest.fixture
def place(database: Servers, tmp_path: Path) -> Iterator[Place]:
    port = free_port()
    env = os.environ | {
        "SUTAZAI_HOME": str(database.home),
        "SUTAZAI_DATABASE_URL": database.database_url,
        "SUTAZAI_BROKER_URL": database.broker_url,
        "SUTAZAI_REDIS_URL": database.redis_url,
        "SUTAZAI_AGENTS": "tests.integration.pools:prefork",
        "SUTAZAI_PORTS": f"{AGENT}={port}",
    }
    with ExitStack() as stack:
        stack.enter_context(logged_statements(database))
        for command in ("api", "worker"):
            log = stack.enter_context((tmp_path / command).open("wb"))
            line = [sys.executable, "-m", "sutazai", command, AGENT]
            process = subprocess.Popen(line, env=env, stdout=log, stderr=log)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90))
        until(lambda: is_healthy(client), 60)
        yield Place(client, database)


def is_healthy(client: httpx.Client) -> bool:
    try:
        return bool(client.get("/health").json()["workers"])
    except httpx.HTTPError:
        return False


@contextmanager
def logged_statements(servers: Servers) -> Iterator[None]:
    """Let PostgreSQL log the statements of every new connection."""
    known = json.loads((servers.home / "credentials.json").read_text())
    address = servers.database_url.split("@", 1)[1]
    url = f"postgresql://postgres:{known['superuser']}@{address}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER ROLE sutazai SET log_statement = 'all'")
        try:
            yield
        finally:
            connection.execute("ALTER ROLE sutazai RESET log_statement")


def test_a_task_costs_four_statements_two_redis_commands_and_no_transaction_of_several(
    place: Place,
) -> None:
    for _ in range(3):
        place.trip()  # what is only done at first
    log = Log(Layout(place.servers.home).log("postgresql"))
    commands = Commands(place.servers.broker_url)
    began = time.monotonic()
    with commands.gathered():
        task_ids = [place.trip() for _ in range(TASKS)]
    took_s = time.monotonic() - began
    statements = log.statements()
    for task_id in task_ids:
        named = [each for each in statements if task_id in each.parameters + each.sql]
        own = [each for each in named if each.verb not in _BY_TIME]
        # The read may overtake nothing: it follows the signal, which follows the outcome.
        assert [each.verb for each in own] == ["accept", "claim", "finish", "read"]
        # Each commits by itself, and of these only accept and finish wait for the disk.
        assert not [each.sql for each in own if each.in_transaction]
        assert sorted(commands.names(task_id)) == ["LPUSH", "PUBLISH"]
    names = Counter(commands.names())
    # A notice is fetched by one command; without notices one is sent a second.
    assert TASKS <= names["BRPOP"] <= TASKS + took_s + 2
    # Celery's own bookkeeping of unacknowledged messages would need more of them.
    often = {name for name, count in names.items() if count >= TASKS}
    assert often - _NOT_OF_TASKS == {"LPUSH", "BRPOP", "PUBLISH"}


def test_a_task_that_nobody_waits_for_costs_no_more(place: Place) -> None:
    place.trip()
    log = Log(Layout(place.servers.home).log("postgresql"))
    headers = {"Prefer": "respond-async"}
    answer = place.client.post("/process", json={"action": "nap", "seconds": 0}, headers=headers)
    task_id = answer.json()["task_id"]
    until(lambda: state(place, task_id) == "succeeded", 60)
    # Its place in the queue is counted at most once a second; each look at it is one statement.
    asked = {"position", "show", *_BY_TIME}
    verbs = verbs_of(log, task_id)
    assert [verb for verb in verbs if verb not in asked] == ["accept", "claim", "finish"]


def test_sixteen_tasks_of_one_message_cost_as_many_statements_as_one(place: Place) -> None:
    place.trip()
    wanted = [Submission(NAP, {"seconds": 0.0}) for _ in range(TOGETHER_MAX)]
    with db.transaction() as connection:
        for submission in wanted:
            admission.accept(connection, submission, rung=True)
    log = Log(Layout(place.servers.home).log("postgresql"))
    commands = Commands(place.servers.broker_url)
    from sutazai.celery import app
    from sutazai.ringer import CeleryBell

    bell = CeleryBell(app)
    with commands.gathered():
        bell.ring([submission.notice for submission in wanted], Pace(together=TOGETHER_MAX))
        ids = [submission.task_id for submission in wanted]
        until(lambda: len(db.run(statements.ended(ids))) == TOGETHER_MAX, 60)
        until(lambda: len(commands.names(str(ids[-1]))) > 1, 60)  # the signal follows the commit
        bell.close()
    verbs = [each.verb for each in log.statements() if str(ids[-1]) in each.parameters]
    assert [verb for verb in verbs if verb not in _BY_TIME] == ["claim", "finish"]
    assert commands.names("LPUSH") == ["LPUSH"]
    # One command tells of all their ends; of some, should recording them be held up for 50 ms.
    told = [name for name in commands.names() if name in ("EVAL", "PUBLISH")]
    assert 1 <= len(told) <= 2


def test_a_look_at_a_task_costs_one_statement(place: Place) -> None:
    task_id = place.trip()
    log = Log(Layout(place.servers.home).log("postgresql"))
    assert state(place, task_id) == "succeeded"
    assert verbs_of(log, task_id) == ["show"]


def state(place: Place, task_id: str) -> str:
    return str(place.client.get(f"/tasks/{task_id}").json()["state"])


def verbs_of(log: Log, task_id: str) -> list[str]:
    return [each.verb for each in log.statements() if task_id in each.parameters + each.sql]


def test_a_batch_of_a_thousand_costs_as_many_statements_as_one_of_ten(place: Place) -> None:
    counts = []
    place.client.post("/queue/pause").raise_for_status()
    for size in (10, 1000):
        log = Log(Layout(place.servers.home).log("postgresql"))
        batch = [{"action": "nap", "params": {"seconds": 0}}] * size
        answer = place.client.post("/tasks/batch", json=batch)
        assert answer.status_code == 202, answer.text
        counts.append([each.verb for each in log.statements()].count("accept"))
    assert counts == [1, 1]
