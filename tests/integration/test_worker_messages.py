"""Messages of any shape on the queue of a real worker, which goes on with its tasks."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from sutazai import db
from sutazai.models import tasks
from sutazai.relay import Relay
from tests.conftest import Servers
from tests.integration import pools
from tests.integration.test_pools import Start, accept, relay, row, rung_until, start

__all__ = ["relay", "start"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def message(content: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as Celery's protocol 2 writes it, with parts replaced."""
    task_id = str(uuid4())
    encoded = base64.b64encode(json.dumps(content).encode()).decode()
    headers = {"lang": "py", "task": "in-prefork.nap", "id": task_id, "root_id": task_id}
    headers |= {"parent_id": None, "group": None, "eta": None, "expires": None, "retries": 0}
    headers |= {"timelimit": [None, None], "argsrepr": "()", "kwargsrepr": "{}", "origin": "x"}
    properties = {"correlation_id": task_id, "reply_to": str(uuid4()), "delivery_mode": 2}
    properties |= {"delivery_info": {"exchange": "", "routing_key": "in-prefork"}, "priority": 0}
    properties |= {"body_encoding": "base64", "delivery_tag": str(uuid4())}
    whole = {"body": encoded, "content-encoding": "utf-8", "content-type": "application/json"}
    whole |= {"headers": headers, "properties": properties}
    for path, value in sorted(changes.items(), key=lambda change: "." not in change[0]):
        part, _, name = path.partition(".")
        if name:
            whole[part][name] = value
        else:
            whole[part] = value
    return whole


PARTS = st.sampled_from(
    [
        *("body", "headers", "properties", "content-type", "content-encoding"),
        *("headers.task", "headers.id", "headers.eta", "headers.expires", "headers.timelimit"),
        *("headers.retries", "headers.group", "headers.lang", "headers.sutazai-ring"),
        *("properties.delivery_info", "properties.body_encoding", "properties.delivery_tag"),
        *("properties.priority", "properties.reply_to", "properties.correlation_id"),
    ]
)
BODY = st.tuples(st.just([]), st.just({"seconds": 0}), st.just({})) | JSON
NEARLY = st.builds(
    lambda body, changes: json.dumps(message(body, changes)).encode(),
    BODY,
    st.dictionaries(PARTS, JSON, max_size=2),
)
MESSAGE = st.one_of(NEARLY, NEARLY, JSON.map(lambda value: json.dumps(value).encode()), st.binary())


def test_no_message_stops_a_worker(database: Servers, start: Start, relay: Relay) -> None:
    worker = start(pools.prefork)
    broker = redis.Redis.from_url(database.broker_url)

    @given(st.lists(MESSAGE, min_size=5, max_size=15))
    @settings(max_examples=15)
    def send(batch: list[bytes]) -> None:
        broker.lpush(pools.prefork.name, *batch)
        task_id = accept(pools.prefork, "nap", seconds=0)
        rung_until(relay, lambda: row(task_id).state == "succeeded")
        assert worker.poll() is None

    send()
    broker.close()


def test_a_task_of_an_unknown_action_fails_at_once_and_another_agents_does_not(
    database: Servers, start: Start, relay: Relay
) -> None:
    start(pools.prefork)
    own, other = (accept(agent, "nap", seconds=0) for agent in (pools.prefork, pools.threads))
    db.run(update(tasks).values(action="gone"))
    stray = {"headers.task": "in-threads.gone", "headers.id": str(other), "headers.sutazai-ring": 1}
    with redis.Redis.from_url(database.broker_url) as broker:
        broker.lpush(pools.prefork.name, json.dumps(message([], stray)))
    rung_until(relay, lambda: row(own).state == "failed")
    assert row(own).error["code"] == "unknown_action"
    assert row(other).state == "queued", "its own worker may know the action"
