"""The relay and the bell, on a real PostgreSQL and a real broker."""

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis as library
from kombu import Connection
from sqlalchemy import func, select, text, update

from sutazai import admission, db, redis, statements
from sutazai.bell import TOGETHER_MAX, WINDOW_MAX, WINDOW_MIN, Notice, Pace, pace
from sutazai.errors import DatabaseBusy
from sutazai.keeper import LIMIT_GRACE_S, Identity
from sutazai.models import new_id, services, tasks, workers
from sutazai.relay import STEADY_S, Relay
from sutazai.ringer import abandon
from sutazai.settings import override
from sutazai.submission import Options, Submission
from sutazai.tasks import load
from sutazai.worker import OUTAGE_S
from tests.conftest import Servers, free_port
from tests.integration.served import until

AGENT = "task-assignment-coordinator"


@pytest.fixture
def bell(database: Servers) -> Iterator[Any]:
    from sutazai.celery import app
    from sutazai.ringer import CeleryBell

    made = CeleryBell(app)
    worker = Identity(f"{AGENT}@here", AGENT, "here")
    with db.transaction() as connection:
        connection.execute(statements.enlist({**worker.row, "slots": 2}))
    yield made
    made.close()


def accept(count: int = 1, *, rung: bool = False, **options: Any) -> None:
    describe = load().get(AGENT).get("describe")
    with db.transaction() as connection:
        for _ in range(count):
            admission.accept(connection, Submission(describe, {}, Options(**options)), rung=rung)


def rings() -> list[int]:
    with db.transaction() as connection:
        return list(connection.execute(select(tasks.c.rings)).scalars())


def depth(bell: Any) -> int:
    bell.close()  # publishes what is in hand
    found = bell.depth(AGENT)
    assert found is not None
    return int(found)


def test_a_due_row_is_rung_and_not_again_at_once(bell: Any) -> None:
    accept(3)
    relay = Relay(bell)
    assert relay.round() == 3
    assert relay.round() == 0
    assert depth(bell) == 3


def test_a_relay_that_is_told_does_not_wait_for_its_next_pass(
    bell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sutazai.relay.IDLE_PASS_S", 600.0)
    relay = Relay(bell)
    running = threading.Thread(target=relay.run)
    running.start()
    try:
        until(lambda: listeners() == 1)
        accept(2)
        redis.announce_due()
        until(lambda: rings() == [1, 1])
    finally:
        relay.stop()
        running.join(10)
    assert not running.is_alive()


def listeners() -> int:
    client = redis.client()
    assert client is not None
    [(_, found)] = client.pubsub_numsub(redis.DUE_CHANNEL)
    return int(found)


def test_the_queue_holds_no_more_than_its_window(bell: Any) -> None:
    accept(WINDOW_MIN + 50)
    relay = Relay(bell)
    assert relay.round() == WINDOW_MIN
    assert depth(bell) == WINDOW_MIN
    assert relay.round() == 0
    asked = threading.Event()
    while bell.room(AGENT, 5):  # the first answer is a guess; within a second it is measured
        assert not asked.wait(0.05)
    assert bell.room(AGENT, 9)


def test_a_window_that_was_filled_and_emptied_is_open_again_at_once(
    bell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sutazai.ringer.OUTDATED_S", 3600.0)
    bell.room(AGENT, 5)
    until(lambda: bell._depths)
    accept(WINDOW_MIN)
    bell.ring([Notice(*row) for row in db.run(statements.ring_unrung(AGENT, WINDOW_MIN))])
    assert not bell.room(AGENT, 5)
    until(lambda: depth(bell) == WINDOW_MIN)
    redis.attempt(lambda client: client.flushall())
    until(lambda: bell.room(AGENT, 5))


@pytest.mark.parametrize(
    ("drained_per_s", "slots", "window", "together"),
    [
        (0, 2, WINDOW_MIN, 1),
        (30, 2, WINDOW_MIN, 1),
        (200, 2, 400, 10),
        (10_000, 2, WINDOW_MAX, TOGETHER_MAX),
        (0, 300, 600, 1),
    ],
)
def test_the_pace_follows_the_speed(
    drained_per_s: float, slots: int, window: int, together: int
) -> None:
    found = pace(drained_per_s, slots, is_behind=True)
    assert found == (window, together, True)
    assert type(found).read(str(found)) == found


def test_the_pace_is_learnt_from_what_workers_say_as_soon_as_they_say_it(
    bell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock, relay = Clock(), Relay(bell)
    monkeypatch.setattr("sutazai.relay.time", clock)

    def learnt(after_s: float, claims: int) -> tuple[int, int]:
        clock.now += after_s
        row: Any = SimpleNamespace(agent=AGENT, slots=2, claims=claims)
        relay._measure(row)
        return relay._paces[AGENT].window, relay._paces[AGENT].together

    assert learnt(0.0, 1000) == (WINDOW_MIN, 1)
    assert learnt(0.3, 1150) == (WINDOW_MIN, 1), "too short a time to judge by"
    assert learnt(0.3, 1240) == (800, TOGETHER_MAX), "400 a second"
    assert learnt(1.5, 1240) == (800, TOGETHER_MAX), "the next heartbeat is not due yet"
    assert learnt(0.5, 1300) == (WINDOW_MIN, 1), "30 a second"
    assert learnt(1.0, 1700) == (800, TOGETHER_MAX)
    assert learnt(3.9, 1700) == (800, TOGETHER_MAX)
    assert learnt(0.2, 1700) == (WINDOW_MIN, 1), "a standstill"


def test_a_queue_that_is_drained_quickly_is_told_of_several_tasks_by_one_message(bell: Any) -> None:
    accept(10)
    accept(concurrency_key="alone")
    relay = Relay(bell)
    relay._paces[AGENT] = Pace(together=4)
    assert relay.round() == 11
    assert depth(bell) == 4, "of 4, 4, 2 and 1"
    assert bell.levels(AGENT) == {5: 16} | {priority: 0 for priority in range(10) if priority != 5}
    assert rings() == [1] * 11


def test_what_is_more_urgent_is_rung_although_the_window_is_full(bell: Any) -> None:
    accept(WINDOW_MIN + 10)
    relay = Relay(bell)
    assert relay.round() == WINDOW_MIN
    assert depth(bell) == WINDOW_MIN
    accept(20, priority=9)
    accept(20, priority=2)
    assert relay.round() == 4, "two a slot, of the level that is empty and more urgent"
    assert depth(bell) == WINDOW_MIN + 4
    assert relay.round() == 0, "what is less urgent would be taken before those that wait"


def test_notices_rung_in_vain_keep_no_new_ones_out(bell: Any) -> None:
    accept(WINDOW_MIN)
    relay = Relay(bell)
    relay.round()
    depth(bell)
    accept(WINDOW_MIN, priority=4)
    late = text("UPDATE tasks SET next_ring_at = now() - interval '1 s' WHERE priority = 5")
    db.run(late)
    broker = redis.client()
    assert broker
    for _ in range(40):  # a worker has taken these, and runs long
        broker.rpop(f"{AGENT}\x06\x164")
    assert relay.round() == 40
    again = text("SELECT count(*) FROM tasks WHERE rings = 1 AND priority = 4")
    assert db.run(again)[0][0] == 30


def test_new_tasks_wait_behind_those_that_were_never_rung(bell: Any) -> None:
    accept(WINDOW_MIN + 1)
    relay = Relay(bell)
    relay.round()
    depth(bell)
    broker = redis.client()
    assert broker
    broker.ltrim(f"{AGENT}\x06\x164", 0, 9)  # drained, but for ten
    asked = threading.Event()
    while bell.room(AGENT, 5):  # the first answer is a guess
        assert not asked.wait(0.05)
    assert bell.room(AGENT, 9)
    relay.round()
    assert depth(bell) == 11
    while not bell.room(AGENT, 5):
        assert not asked.wait(0.05)


def test_urgent_notices_are_served_first(bell: Any) -> None:
    accept(priority=1)
    accept(priority=9)
    Relay(bell).round()
    assert depth(bell) == 2
    levels = redis.attempt(lambda client: sorted(client.keys(f"{AGENT}*")))
    # Redis serves level 0 first, whose list has no suffix: our priority 9.
    assert levels == [AGENT, f"{AGENT}\x06\x168"]


def test_redis_keeps_no_list_of_unacknowledged_notices(bell: Any) -> None:
    from sutazai.celery import app

    accept()
    Relay(bell).round()
    assert depth(bell) == 1
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[AGENT](connection.default_channel)
        assert queue.get() is not None
        assert redis.attempt(lambda client: client.keys("unacked*")) == []


def test_celerys_own_limit_spares_what_waits_for_postgresql_or_to_be_alone(bell: Any) -> None:
    from sutazai.celery import app

    accept(priority=9)
    accept(priority=1)
    with db.transaction() as connection:
        connection.execute(tasks.update().values(alone=True).where(tasks.c.priority == 1))
        limit_s = connection.execute(select(tasks.c.time_limit_s)).scalars().first()
    assert limit_s
    Relay(bell).round()
    assert depth(bell) == 2
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[AGENT](connection.default_channel)
        (hard_s, _), alone = [queue.get().headers["timelimit"] for _ in range(2)]
    assert hard_s > limit_s + LIMIT_GRACE_S + OUTAGE_S
    assert alone == [None, None]


def test_nothing_is_rung_without_a_worker_or_while_paused(bell: Any) -> None:
    accept()
    with db.transaction() as connection:
        connection.execute(text("INSERT INTO queues VALUES (:agent, true)"), {"agent": AGENT})
    assert Relay(bell).round() == 0
    with db.transaction() as connection:
        connection.execute(text("DELETE FROM queues"))
        connection.execute(text("UPDATE workers SET stopped_at = now()"))
    assert Relay(bell).round() == 0


def test_when_the_broker_forgets_everything_it_is_told_again(bell: Any) -> None:
    accept(3)
    relay = Relay(bell)
    relay.round()
    assert depth(bell) == 3
    redis.attempt(lambda client: client.flushall())
    assert relay.round() == 3
    assert depth(bell) == 3


def test_the_broker_is_asked_itself_when_signals_go_elsewhere(database: Servers, bell: Any) -> None:
    """Here to another database of the same server."""
    accept()
    relay = Relay(bell)
    override(redis_url=f"{database.redis_url.rpartition('/')[0]}/1")
    try:
        assert relay.round() == 1
        assert depth(bell) == 1
        with library.Redis.from_url(database.broker_url) as broker:
            broker.flushdb()
        assert relay.round() == 1
        assert depth(bell) == 1
    finally:
        override(redis_url=database.redis_url)


def test_a_broker_restarted_from_an_old_dump_is_noticed_by_its_run_id(bell: Any) -> None:
    from sutazai.broker import REDIS_MARK

    accept()
    relay = Relay(bell)
    relay.round()
    redis.attempt(lambda client: client.set(REDIS_MARK, "the run id of before"))
    assert relay.round() == 1
    assert rings() == [2]


def test_an_unreachable_broker_costs_a_second_not_a_task(
    database: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sutazai.celery import app
    from sutazai.ringer import CeleryBell
    from sutazai.tasks import load

    bell = CeleryBell(app)
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    monkeypatch.setattr(app, "connection_for_write", lambda: Connection(nowhere))
    describe = load().get(AGENT).get("describe")
    submission = Submission(describe, {}, Options())
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=True)
    assert rings() == [1]
    bell.ring([submission.notice])
    bell.close(30)
    assert rings() == [0]
    with db.transaction() as connection:
        in_s = connection.execute(
            text("SELECT extract(epoch FROM next_ring_at - now()) FROM tasks")
        ).scalar_one()
    assert in_s <= 1


def steady(bell: Any) -> Relay:
    """Return a relay that has long been in touch with PostgreSQL."""
    relay = Relay(bell)
    relay._steady_since = time.monotonic() - STEADY_S
    return relay


def lose() -> None:
    """Let a worker claim a task, and its lease run out."""
    accept()
    [task] = db.run(select(tasks.c.task_id, tasks.c.agent, tasks.c.action))
    site = {"worker": f"{AGENT}@there", "worker_id": new_id(), "host": "there"}
    assert db.run(statements.claim(**task._mapping, claim_id=new_id(), **site))
    db.run(tasks.update().values(lease_expires_at=func.now()))


def states() -> list[str]:
    return [row.state for row in db.run(select(tasks.c.state))]


def test_what_a_lost_worker_ran_is_taken_back(bell: Any) -> None:
    lose()
    Relay(bell).round()
    assert states() == ["running"], "who was away until now could not extend it"
    steady(bell).round()
    assert states() == ["queued"]


def test_the_notices_that_a_dead_worker_held_are_rung_again_once(bell: Any) -> None:
    """It ran nothing, so no lease tells of its death."""
    accept(2)
    dead = Identity(f"{AGENT}@there", AGENT, "there")
    with db.transaction() as connection:
        connection.execute(statements.enlist({**dead.row, "slots": 2}))
    relay = steady(bell)
    assert relay.round() == 2
    is_dead = workers.c.worker_id == dead.worker_id
    db.run(
        workers.update().where(is_dead).values(heartbeat_at=text("now() - interval '31 seconds'"))
    )
    relay._rescued_at = 0.0
    assert relay.round() == 2
    relay._rescued_at = 0.0
    assert relay.round() == 0
    assert rings() == [2, 2]
    stopped = select(workers.c.stopped_at).where(is_dead)
    assert db.run(stopped)[0].stopped_at
    db.run(statements.beat(dead.worker_id, running=0, slots=2, consuming=True, claims=0))
    assert db.run(stopped)[0].stopped_at is None, "it was only cut off"


@pytest.mark.parametrize("lasts", [True, False], ids=["a locked table", "a slow answer"])
def test_a_stall_of_postgresql_is_an_outage_that_loses_no_leases(
    bell: Any, lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sutazai.relay.SLOW_S", 0.2)
    relay = steady(bell)
    lose()
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND clock_timestamp() - query_start > interval '0.3 s'"
    )
    with ThreadPoolExecutor(1) as pool:
        with db.engine().begin() as stall:
            stall.execute(text("LOCK TABLE tasks"))
            passed = pool.submit(relay.round)
            until(passed.done if lasts else lambda: db.run(waits)[0].count)
        if lasts:
            with pytest.raises(DatabaseBusy):
                passed.result()
        else:
            passed.result()
    relay.round()
    assert states() == ["running"]


def test_a_relay_says_that_it_lives_and_says_goodbye(bell: Any) -> None:
    relay = Relay(bell)
    relay.round()
    with db.transaction() as connection:
        assert connection.execute(select(services.c.kind)).scalars().all() == ["relay"]
    relay.stop()
    relay.run()
    with db.transaction() as connection:
        assert connection.execute(select(services.c.kind)).scalars().all() == []


def test_two_beats_make_one_task_a_tick(bell: Any) -> None:
    from sutazai.celery import app
    from sutazai.scheduler import PostgresScheduler

    host = Identity("hardware-resource-optimizer@here", "hardware-resource-optimizer", "here")
    with db.transaction() as connection:
        connection.execute(statements.enlist({**host.row, "slots": 1}))
    beats = [PostgresScheduler(app=app), PostgresScheduler(app=app)]
    waits = [beat.tick() for beat in beats]
    assert all(0 < wait <= 5 for wait in waits)
    with db.transaction() as connection:
        ticks = connection.execute(
            select(tasks.c.scheduled_by, tasks.c.host, tasks.c.deadline_at > tasks.c.tick_at)
        ).all()
    assert len(ticks) == len(set(ticks))
    assert ("hardware-resource-optimizer.sample", "here", True) in ticks
    for beat in beats:
        beat.close()


def test_the_bell_of_a_command_that_ends_at_once_still_rings(bell: Any) -> None:
    from sutazai.celery import find_action, submit

    assert submit(Submission(find_action(f"{AGENT}.describe"), {}, Options()))
    from sutazai import celery

    celery.bell().close()
    assert depth(bell) == 1


def test_a_connection_that_is_given_up_is_closed(database: Servers) -> None:
    from sutazai.celery import _broker_answers, app
    from sutazai.ringer import CeleryBell

    def clients() -> int:
        found = redis.attempt(lambda client: client.info("clients")["connected_clients"])
        assert found is not None
        return int(found)

    bell = CeleryBell(app)
    assert bell.depth(AGENT) == 0
    connection = bell._reading
    gc.collect()  # connections of others that nobody holds any more
    before = clients()
    assert all(_broker_answers() for _ in range(5))
    assert clients() <= before, "garbage of other tests may go meanwhile"
    abandon(connection)
    assert clients() < before


def test_the_relay_keeps_ended_tasks_as_long_as_their_agent_says(
    bell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sutazai.celery import find_action

    with db.transaction() as connection:
        for action in (f"{AGENT}.describe", "ai-metrics-exporter.describe"):
            submission = Submission(find_action(action), {}, Options())
            admission.accept(connection, submission, rung=False)
        connection.execute(
            update(tasks).values(
                state="failed", finished_at=text("now() - interval '3 days'"), next_ring_at=None
            )
        )
    monkeypatch.setattr(load().get(AGENT), "retention", timedelta(days=2))
    Relay(bell).round()
    assert db.run(select(tasks.c.agent)) == [("ai-metrics-exporter",)]
