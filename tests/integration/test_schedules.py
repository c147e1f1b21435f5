"""Schedules on real stores: ticks, overlap, catching up, routes, commands, Celery's Beat."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from sqlalchemy import select, text

from sutazai import db, lifecycle, schedule, statements
from sutazai.agent import Agent
from sutazai.cli import run
from sutazai.errors import UnknownAgent
from sutazai.keeper import Identity
from sutazai.models import schedules, tasks
from sutazai.schedule import NewSchedule
from sutazai.scheduler import PostgresScheduler, declare
from tests.conftest import Servers
from tests.integration.served import Front, until

_JSON = {"Content-Type": "application/json"}

AGENT = "task-assignment-coordinator"


def agents() -> Mapping[str, Agent]:
    from sutazai.tasks import load

    return load().agents


def period_s(least: int, first: float, last: float) -> int:
    """Return a period that is now between two fractions of itself.

    Ticks come on multiples of it: none comes while a test runs, whenever that is.
    """
    periods = range(least, 2 * least)
    return next(each for each in periods if first < time.time() % each / each < last)


@cache
def usual_s() -> int:
    """Return a period whose latest tick came a moment ago."""
    return period_s(60, 0, 0.25)


@pytest.fixture(autouse=True)
def _period() -> None:
    usual_s.cache_clear()


def add(name: str = "s", *, late: int | None = None, **values: Any) -> None:
    """Add a schedule; late: so many ticks before the latest one were not taken either."""
    times = {} if "cron" in values else {"every_s": usual_s()}
    new = NewSchedule(name=name, action="describe", **{**times, **values})
    each_s = 60 if "cron" in values else times["every_s"]
    with db.transaction() as connection:
        schedule.add(connection, new, agents()[AGENT])
        if late is not None:
            connection.execute(
                text(
                    "UPDATE schedules SET next_tick_at = to_timestamp("
                    "floor(extract(epoch FROM now()) / :each_s) * :each_s - :late * :each_s) "
                    "WHERE name = :name"
                ),
                {"late": late, "each_s": each_s, "name": name},
            )


def put_back(ticks: int, name: str = "s") -> None:
    """Let the latest ticks that were taken come again."""
    with db.transaction() as connection:
        connection.execute(
            text(
                "UPDATE schedules SET next_tick_at = next_tick_at "
                "- :ticks * make_interval(secs => every_s) WHERE name = :name"
            ),
            {"ticks": ticks, "name": name},
        )


def take(name: str = "s") -> schedule.Taken | None:
    with db.transaction() as connection:
        return schedule.take(connection, name, agents())


def row(name: str = "s") -> Any:
    with db.transaction() as connection:
        return connection.execute(select(schedules).where(schedules.c.name == name)).one()


def made(name: str = "s") -> list[Any]:
    query = select(tasks).where(tasks.c.scheduled_by == name).order_by(tasks.c.task_id)
    with db.transaction() as connection:
        return list(connection.execute(query).all())


def states(name: str = "s") -> list[str]:
    return [task.state for task in made(name)]


@pytest.fixture
def conf(database: Servers) -> Iterator[Any]:
    from sutazai.celery import app

    yield app.conf
    app.conf.beat_schedule = {}


# --- ticks ----------------------------------------------------------------------------------


def test_two_beats_at_once_make_one_task_a_tick(conf: Any) -> None:
    from sutazai.celery import app

    declare(app.conf)
    names = [f"s{number}" for number in range(20)]
    for name in names:
        add(name, late=5, catch_up=3, overlap="queue")
    beats = [PostgresScheduler(app=app) for _ in range(3)]
    together = threading.Barrier(len(beats))

    def tick(beat: PostgresScheduler) -> float:
        together.wait(10)
        return beat.tick()

    with ThreadPoolExecutor(len(beats)) as pool:
        waits = list(pool.map(tick, beats))
    assert all(0 < wait <= 5 for wait in waits)
    for name in names:
        ticks = [task.tick_at for task in made(name)]
        assert len(ticks) == len(set(ticks)) == 3
        assert row(name).missed == 3
        assert row(name).last_tick_at == max(ticks)
    for beat in beats:
        beat.close()


def test_a_beat_that_takes_long_over_one_schedule_holds_up_no_other_beat(conf: Any) -> None:
    from sutazai.celery import app

    add("busy", late=1)
    add("free", late=1)
    beat = PostgresScheduler(app=app)
    with db.transaction() as another:
        assert another.execute(statements.take_schedule("busy")).first()
        beat.tick()
    beat.close()
    assert (len(made("busy")), len(made("free"))) == (0, 1)
    assert row("busy").last_tick_at is None


def test_a_tick_is_not_taken_again_even_if_its_row_forgets(database: Servers) -> None:
    add(late=0, overlap="queue")
    taken = take()
    assert taken is not None
    assert len(taken.due) == 1
    assert take() is None
    with db.transaction() as connection:
        connection.execute(text("UPDATE schedules SET next_tick_at = last_tick_at"))
    again = take()
    assert again is not None
    assert again.due == []
    assert len(made()) == 1


def test_a_new_schedule_waits_for_its_next_tick(database: Servers) -> None:
    add(every_s=3600)
    add("daily", cron="30 2 * * *", time_zone="Europe/Berlin")
    with db.transaction() as connection:
        now = connection.execute(statements.now()).scalar_one()
        assert connection.execute(statements.due_schedules([AGENT])).all() == []
    assert row().next_tick_at > now
    assert row("daily").next_tick_at.minute == 30


@pytest.mark.parametrize(
    ("catch_up", "taken", "missed"), [("none", 0, 12), ("last", 1, 11), (4, 4, 8), (100, 12, 0)]
)
@pytest.mark.parametrize("kind", ["every_s", "cron"])
def test_after_an_outage_of_all_beats(
    database: Servers, kind: str, catch_up: Any, taken: int, missed: int
) -> None:
    # In both the latest tick came half a period ago, and so is not on time.
    timing: dict[str, Any] = {"every_s": period_s(3600, 0.4, 0.6)}
    if kind == "cron":
        timing = {"cron": f"{(datetime.now(UTC).minute + 30) % 60} * * * *"}
    add(catch_up=catch_up, overlap="queue", **timing)
    with db.transaction() as connection:
        connection.execute(
            text(
                "UPDATE schedules SET next_tick_at = next_tick_at "
                "- 12 * make_interval(secs => coalesce(every_s, 3600))"
            )
        )
    take()
    assert (len(made()), row().missed) == (taken, missed)


def test_what_was_missed_is_counted_and_ticking_goes_on(database: Servers) -> None:
    add(late=10, catch_up="last")
    take()
    assert (len(made()), row().missed) == (1, 10)
    with db.transaction() as connection:
        next_s = connection.execute(statements.next_tick([AGENT])).scalar_one()
    assert 0 < next_s <= usual_s()


def test_overlap_skip(database: Servers) -> None:
    add(late=2, catch_up=5)
    take()
    assert states() == ["queued"]
    assert (row().skipped, row().missed) == (2, 0)


def test_overlap_queue(database: Servers) -> None:
    add(late=2, catch_up=5, overlap="queue")
    take()
    assert states() == ["queued"] * 3


def test_overlap_replace(database: Servers) -> None:
    add(late=2, catch_up=5, overlap="replace")
    taken = take()
    assert states() == ["cancelled", "cancelled", "queued"]
    assert taken is not None
    assert len(taken.ended) == 2


def test_an_ended_task_is_not_in_the_way(database: Servers) -> None:
    add(late=0)
    take()
    with db.transaction() as connection:
        lifecycle.cancel(connection, made()[0].task_id)
    put_back(2)
    take()
    assert row().skipped == 0


def test_jitter_starts_later_and_is_left_to_the_relay(database: Servers) -> None:
    add(late=0, jitter_s=3600, expires=True)
    taken = take()
    [task] = made()
    next_at = task.tick_at + timedelta(seconds=usual_s())
    assert task.tick_at <= task.run_at < next_at
    assert task.deadline_at == next_at
    is_due = task.run_at <= task.created_at
    assert taken is not None
    assert [len(taken.due), task.next_ring_at is not None] == [int(is_due), is_due]


def test_a_draining_queue_misses_its_tick_and_stops_no_other(conf: Any) -> None:
    from sutazai.celery import app

    add("drained", late=0, overlap="replace")
    take("drained")
    add("other", late=0)
    with db.transaction() as connection:
        connection.execute(
            text("UPDATE schedules SET agent = 'ai-metrics-exporter' WHERE name = 'other'")
        )
        connection.execute(statements.set_queue(AGENT, draining=True))
    put_back(2, "drained")
    beat = PostgresScheduler(app=app)
    beat.tick()
    assert states("drained") == ["queued"]  # what was to be replaced is still there
    assert row("drained").missed == 2
    assert states("other") == ["queued"]
    beat.close()


def test_a_schedule_that_cannot_be_read_here_stops_no_other(conf: Any) -> None:
    from sutazai.celery import app

    add("first", cron="* * * * *", late=1)
    add("second", late=0)
    with db.transaction() as connection:
        connection.execute(
            text("UPDATE schedules SET time_zone = 'Mars/Olympus' WHERE name = 'first'")
        )
    beat = PostgresScheduler(app=app)
    assert beat.tick() >= 1, "it is not tried again and again without a pause"
    assert (states("first"), states("second")) == ([], ["queued"])
    with db.transaction() as connection:
        connection.execute(text("UPDATE schedules SET time_zone = 'Europe/Berlin'"))
    beat.tick()
    assert states("first") == ["queued"]
    beat.close()


def test_a_schedule_whose_action_is_gone_misses_its_ticks(database: Servers) -> None:
    add(late=0)
    with db.transaction() as connection:
        connection.execute(text("UPDATE schedules SET action = 'gone'"))
    take()
    assert (made(), row().missed) == ([], 1)


def test_each_host_has_a_task_of_its_own(database: Servers) -> None:
    for host in ("a", "b"):
        worker = Identity(f"{AGENT}@{host}", AGENT, host)
        with db.transaction() as connection:
            connection.execute(statements.enlist({**worker.row, "slots": 1}))
    add(late=1, on="each-host", catch_up=2)
    take()
    assert sorted(task.host for task in made()) == ["a", "b"]
    assert row().skipped == 2


# --- declarations and celeryconfig ----------------------------------------------------------


def test_pausing_a_declared_schedule_survives_a_restart_of_beat(conf: Any) -> None:
    name = "hardware-resource-optimizer.sample"
    declare(conf)
    assert row(name).source == "declaration"
    assert row(name).next_tick_at.timestamp() % row(name).every_s == 0
    assert run(["schedule", "pause", name]) == 0
    before = row(name)
    declare(conf)
    assert row(name) == before
    assert not before.enabled
    assert take(name) is None
    assert run(["schedule", "resume", name]) == 0
    assert row(name).next_tick_at >= before.next_tick_at
    assert row(name).enabled


def test_beat_schedule_becomes_rows_and_leaves_again(conf: Any) -> None:
    add("mine")
    task = f"{AGENT}.describe"
    conf.beat_schedule = {
        "often": {"task": task, "schedule": 30},
        "mine": {"task": task, "schedule": 30},
        "wrong": {"task": task, "schedule": 30, "args": (1,)},
    }
    declare(conf)
    assert (row("often").source, row("often").every_s) == ("celeryconfig", 30)
    assert row("mine").source == "user"
    conf.beat_schedule = {"often": {"task": task, "schedule": 45}}
    declare(conf)
    assert row("often").next_tick_at.timestamp() % 45 == 0
    conf.beat_schedule = {}
    declare(conf)
    with db.transaction() as connection:
        names = set(connection.execute(select(schedules.c.name)).scalars())
    assert "mine" in names
    assert not names & {"often", "wrong"}


def test_plain_celery_beat_runs_it(conf: Any) -> None:
    add(every_s=1, overlap="queue")
    command = [sys.executable, "-m", "celery", "-A", "sutazai", "beat"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(made()) >= 2, 60)
        listed = row("hardware-resource-optimizer.sample")
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert listed.source == "declaration"
    assert all(task.source == "beat" for task in made())


# --- routes ---------------------------------------------------------------------------------

NEW = {"name": "adds", "action": "add", "params": {"first": 1}, "every_s": 3600}


def test_the_life_of_a_schedule_over_http(front: Front) -> None:
    client = front.client
    answer = client.post("/schedules", json=NEW)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/schedules/adds"
    added = answer.json()
    assert (added["agent"], added["source"], added["overlap"]) == ("test-front", "user", "skip")
    assert (added["catch_up"], added["on"], added["missed"]) == ("last", "any-host", 0)
    assert client.get("/schedules").json() == {"schedules": [added]}
    assert client.get("/schedules/adds").json() == added
    ran = client.post("/schedules/adds/run")
    assert ran.status_code == 202
    task = client.get(f"/tasks/{ran.json()['task_id']}?wait=10").json()
    assert (task["scheduled_by"], task["result"]) == ("adds", {"total": 1})
    changed = client.patch(
        "/schedules/adds",
        json={
            "cron": "7 3 * * *",  # never on the hour, as the period is
            "time_zone": "Europe/Berlin",
            "catch_up": 5,
            "params": {"first": 2},
        },
    ).json()
    assert (changed["every_s"], changed["cron"], changed["catch_up"]) == (None, "7 3 * * *", 5)
    assert changed["next_tick_at"] != added["next_tick_at"]
    assert client.patch("/schedules/adds", json={"enabled": False}).json()["enabled"] is False
    assert client.patch("/schedules/adds", json={"every_s": 60}).json()["cron"] is None
    assert client.patch("/schedules/adds", json={}).json()["every_s"] == 60
    assert client.delete("/schedules/adds").status_code == 204
    assert client.get("/schedules/adds").status_code == 404


def test_a_front_lists_its_own_agents_schedules(front: Front) -> None:
    add("elsewhere")
    front.client.post("/schedules", json=NEW)
    names = [found["name"] for found in front.client.get("/schedules").json()["schedules"]]
    assert names == ["adds"]
    names = [found["name"] for found in front.client.get("/schedules?agent=*").json()["schedules"]]
    assert names == ["adds", "elsewhere"]
    assert front.client.get("/schedules?agent=nobody").status_code == 422
    assert front.client.get("/schedules/elsewhere").status_code == 200


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"action": "nope"}, None),
        ({"params": {"first": "x"}}, "first"),
        ({"params": {}}, "first"),
        ({"every_s": None}, "every_s"),
        ({"cron": "* * * * *"}, "every_s"),
        ({"every_s": None, "cron": "nonsense"}, "cron"),
        ({"every_s": None, "cron": "99 * * * *"}, "cron"),
        ({"time_zone": "Nowhere/Town"}, "time_zone"),
        ({"every_s": 0.5}, "every_s"),
        ({"every_s": "60"}, "every_s"),
        ({"name": "with space"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": ""}, "name"),
        ({"overlap": "both"}, "overlap"),
        ({"catch_up": 0}, None),
        ({"catch_up": 5, "expires": True}, "catch_up"),
        ({"jitter_s": -1}, "jitter_s"),
        ({"agent": "other"}, "agent"),
        ({"priority": 10}, "priority"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_added(
    front: Front, more: dict[str, Any], field: str | None
) -> None:
    answer = front.client.post("/schedules", json=NEW | more)
    assert answer.status_code == 422, answer.text
    assert answer.json()["status"] == "error"
    if field:
        assert field in [detail["field"] for detail in answer.json()["details"]]
    assert front.client.get("/schedules?agent=*").json() == {"schedules": []}


def test_conflicts_and_what_is_not_there(front: Front) -> None:
    client = front.client
    assert client.post("/schedules", json=NEW).status_code == 201
    again = client.post("/schedules", json=NEW)
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    for name in ("nothing", "a%00b", "%E2%82%AC"):
        for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/run")):
            body = {"json": {}} if method == "PATCH" else {}
            answer = client.request(method, f"/schedules/{name}{path}", **body)
            assert (answer.status_code, answer.json()["code"]) == (404, "schedule_not_found")
    assert client.post("/schedules", content=b"{", headers=_JSON).status_code == 400
    assert client.patch("/schedules/adds", json={"nmae": 1}).status_code == 422
    assert client.patch("/schedules/adds", json={"every_s": 0}).status_code == 422
    assert client.patch("/schedules/adds", json={"priority": 11}).status_code == 422
    assert client.put("/schedules/adds", json={}).status_code == 405


@pytest.mark.parametrize(
    ("source", "where"), [("declaration", "every="), ("celeryconfig", "celeryconfig.py")]
)
def test_a_schedule_declared_elsewhere_is_paused_and_run_only(
    front: Front, source: str, where: str
) -> None:
    client = front.client
    client.post("/schedules", json=NEW)
    with db.transaction() as connection:
        connection.execute(text("UPDATE schedules SET source = :source"), {"source": source})
    for answer in (
        client.patch("/schedules/adds", json={"every_s": 60}),
        client.delete("/schedules/adds"),
    ):
        assert answer.status_code == 409
        assert where in answer.json()["message"]
    for enabled in (False, True):
        answer = client.patch("/schedules/adds", json={"enabled": enabled})
        assert answer.json()["enabled"] is enabled
    assert client.post("/schedules/adds/run").status_code == 202


def test_running_with_a_key_makes_one_task(front: Front) -> None:
    front.client.post("/schedules", json=NEW)
    headers = {"Idempotency-Key": "k"}
    ids = {
        front.client.post("/schedules/adds/run", headers=headers).json()["task_id"]
        for _ in range(3)
    }
    assert len(ids) == 1
    front.client.post("/queue/drain")
    assert front.client.post("/schedules/adds/run").status_code == 409


def test_ticks_while_paused_are_not_missed(front: Front) -> None:
    front.client.post("/schedules", json=NEW)
    front.client.patch("/schedules/adds", json={"enabled": False})
    with db.transaction() as connection:
        connection.execute(text("UPDATE schedules SET next_tick_at = now() - interval '9 hours'"))
        assert connection.execute(statements.due_schedules(["test-front"])).all() == []
    front.client.patch("/schedules/adds", json={"enabled": True})
    with db.transaction() as connection:
        now = connection.execute(statements.now()).scalar_one()
    assert (row("adds").next_tick_at > now, row("adds").missed) == (True, 0)


def test_a_schedule_of_an_agent_that_is_gone(front: Front) -> None:
    add("elsewhere")
    assert front.client.post("/schedules/elsewhere/run").status_code == 404
    with pytest.raises(UnknownAgent):
        schedule.run_once(row("elsewhere"), {}, source="api")


# --- commands -------------------------------------------------------------------------------


def test_the_commands(conf: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def ask(*arguments: str) -> Any:
        assert run(["schedule", *arguments]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    added = ask(
        *("add", "nightly", AGENT, "describe", "--cron", "0 3 * * *", "--overlap", "queue"),
        *("--time-zone", "Europe/Berlin", "--catch-up", "2", "--jitter", "60", "--paused"),
    )
    assert (added["enabled"], added["catch_up"], added["jitter_s"]) == (False, 2, 60)
    assert [found["name"] for found in ask("list", "--json")] == ["nightly"]
    assert ask("list", "--agent", "ai-metrics-exporter", "--json") == []
    assert ask("resume", "nightly")["enabled"] is True
    assert ask("pause", "nightly")["enabled"] is False
    assert ask("change", "nightly", "--every", "60", "--each-host")["on"] == "each-host"
    task_id = ask("run", "nightly")["task_id"]
    assert [(str(task.task_id), task.tick_at) for task in made("nightly")] == [(task_id, None)]
    assert run(["schedule", "list"]) == 0
    assert "every 60 s" in capfd.readouterr().out
    assert ask("remove", "nightly")["name"] == "nightly"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "a", AGENT, "describe"], "Give either every_s or cron"),
        (["add", "a", AGENT, "describe", "--every", "60", "--cron", "* * * * *"], "either"),
        (["add", "a", AGENT, "describe", "--cron", "x"], "five fields"),
        (["add", "a b", AGENT, "describe", "--every", "60"], "name"),
        (["add", "a", AGENT, "nope", "--every", "60"], "has no action"),
        (["add", "a", "nobody", "describe", "--every", "60"], "no agent"),
        (["add", "a", AGENT, "describe", "--every", "60", "-p", "x=1"], "x"),
        (["add", "a", AGENT, "describe", "--every", "60", "--catch-up", "all"], "catch_up"),
        (["run", "nothing"], "no schedule"),
        (["remove", "hardware-resource-optimizer.sample"], "every="),
    ],
)
def test_commands_refuse_in_one_line(
    conf: Any, capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    declare(conf)
    assert run(["schedule", *arguments]) == 2
    assert says in capfd.readouterr().err
