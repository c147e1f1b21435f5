"""Callbacks, delivered to a real HTTP server on this machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import text

from sutazai import admission, callbacks, db, lifecycle, statements
from sutazai.agent import Agent
from sutazai.callbacks import AT_ONCE, LEASE_S, TRIES, Courier
from sutazai.errors import InvalidInput
from sutazai.settings import override, settings
from sutazai.submission import Options, Submission

agent = Agent("tester", port=9999, doc="Tests.")
SECRET = "a secret of the tests"


class Call(NamedTuple):
    connection: Any
    path: str
    headers: Any
    body: bytes


class Receiver:
    """Answers with the statuses that it is told, and keeps what came."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.statuses: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections, as receivers do

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.calls.put(Call(self.client_address, self.path, self.headers, body))
                self.send_response(outer.statuses.pop(0) if outer.statuses else 204)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self.server.server_port}/ended?x=1"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class RawReceiver:
    """Takes connections and does with each, on a thread of its own, what it is told."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.connections: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://localhost:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        """End everything; a connection that is still open is broken off."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for connection in self.connections:
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                thread = threading.Thread(target=self._run, args=(connection,))
                self.threads.append(thread)
                thread.start()

    def _run(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self._serve(connection)


@pytest.fixture
def receiver(database: Any) -> Iterator[Receiver]:
    override(callback_secret=SECRET, callback_hosts="localhost")
    made = Receiver()
    yield made
    made.close()
    override(callback_secret=None, callback_hosts=None)


@pytest.fixture
def courier() -> Iterator[Courier]:
    made = Courier()
    yield made
    made.close()


def ended(url: str) -> UUID:
    """Make a task with a callback that has ended."""
    return ended_unchecked(callbacks.checked(Options(callback_url=url)))


def ended_unchecked(options: Options) -> UUID:
    submission = Submission(agent.get("describe"), {}, options)
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=False)
        lifecycle.cancel(connection, submission.task_id)
    return submission.task_id


def deliver(courier: Courier) -> int:
    """Do one round and wait for its deliveries."""
    begun = courier.round()
    courier.finish()
    return begun


def row(task_id: UUID) -> Any:
    with db.transaction() as connection:
        found = connection.execute(
            text("SELECT * FROM tasks WHERE task_id = :task_id"), {"task_id": task_id}
        )
        return found.one()


def make_due() -> None:
    with db.transaction() as connection:
        connection.execute(text("UPDATE tasks SET callback_next_at = now()"))


def test_an_ended_task_is_posted_once_and_signed(receiver: Receiver, courier: Courier) -> None:
    task_id = ended(receiver.url)
    assert deliver(courier) == 1
    call = receiver.calls.get(timeout=10)
    assert call.path == "/ended?x=1"
    assert call.headers["Host"] == f"localhost:{receiver.server.server_port}"
    assert json.loads(call.body)["state"] == "cancelled"
    assert call.headers["webhook-id"] == json.loads(call.body)["task_id"] == str(task_id)
    signed = f"{task_id}.{call.headers['webhook-timestamp']}.".encode() + call.body
    digest = hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()
    assert call.headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
    assert deliver(courier) == 0
    assert row(task_id).callback_settled_at is not None


def test_a_task_that_has_not_ended_is_not_posted(receiver: Receiver, courier: Courier) -> None:
    submission = Submission(agent.get("describe"), {}, Options(callback_url=receiver.url))
    with db.transaction() as connection:
        admission.accept(connection, submission, rung=False)
    assert deliver(courier) == 0


@pytest.mark.parametrize("status", [500, 404, 302])
def test_what_is_not_taken_is_tried_again(
    receiver: Receiver, courier: Courier, status: int
) -> None:
    receiver.statuses = [status]
    task_id = ended(receiver.url)
    assert deliver(courier) == 1
    found = row(task_id)
    assert found.callback_settled_at is None
    assert str(status) in found.callback_error
    assert deliver(courier) == 0, "not before its time"
    make_due()
    assert deliver(courier) == 1
    assert row(task_id).callback_error is None
    assert receiver.calls.qsize() == 2


def test_a_receiver_that_is_gone_or_never_there_ends_the_tries(
    receiver: Receiver, courier: Courier
) -> None:
    receiver.statuses = [410]
    gone = ended(receiver.url)
    assert deliver(courier) == 1
    assert "410" in row(gone).callback_error
    absent = ended("http://localhost:1/")
    for tried in range(1, TRIES + 1):
        make_due()
        assert deliver(courier) == 1, tried
    assert row(absent).callback_settled_at is not None
    make_due()
    assert deliver(courier) == 0


def test_two_couriers_post_each_task_once(receiver: Receiver) -> None:
    tasks = {str(ended(receiver.url)) for _ in range(24)}
    couriers = [Courier(), Courier()]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            list(pool.map(deliver, couriers))
    for courier in couriers:
        courier.close()
    posted = [json.loads(receiver.calls.get(timeout=1).body)["task_id"] for _ in tasks]
    assert set(posted) == tasks
    assert receiver.calls.empty()


def test_a_private_address_is_refused_when_it_is_called_too(
    receiver: Receiver, courier: Courier
) -> None:
    task_id = ended(receiver.url)
    override(callback_hosts=None)  # as if the name had meant a public address before
    assert deliver(courier) == 1
    assert "not a public address" in row(task_id).callback_error
    assert receiver.calls.empty()


def test_without_a_secret_none_is_taken(tmp_path: Path) -> None:
    home = settings().home
    override(home=str(tmp_path))  # a home that has none
    with pytest.raises(InvalidInput, match="SUTAZAI_CALLBACK_SECRET"):
        callbacks.checked(Options(callback_url="https://example.org/"))
    override(home=str(home))


@pytest.mark.parametrize(
    ("allowed", "host"), [("10.0.0.0/8", "10.1.2.3"), ("fd00::/8", "[fd00::1]")]
)
def test_networks_can_be_allowed(allowed: str, host: str) -> None:
    options = Options(callback_url=f"http://{host}/")
    override(callback_secret=SECRET)
    with pytest.raises(InvalidInput, match="not a public address"):
        callbacks.checked(options)
    override(callback_hosts=allowed)
    assert callbacks.checked(options) is options
    override(callback_secret=None, callback_hosts=None)


# --- receivers that are slow ----------------------------------------------------------------


def say_nothing(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def test_silent_receivers_keep_no_other_waiting(
    receiver: Receiver, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "DEADLINE_S", LEASE_S)
    with ThreadPoolExecutor(1) as pool, closing(RawReceiver(say_nothing)) as silent:
        waiting = [ended(silent.url) for _ in range(8)]
        served = ended(receiver.url)
        rounds = pool.submit(lambda: [courier.round() for _ in range(3)])
        call = receiver.calls.get(timeout=30)
        assert call.headers["webhook-id"] == str(served)
        assert [row(task_id).callback_error for task_id in waiting] == [None] * 8
    assert sum(rounds.result()) == 9
    courier.finish()
    assert all(row(task_id).callback_error for task_id in waiting)


def test_no_more_is_taken_than_there_is_room_for(
    receiver: Receiver, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "FULL_S", 0.01)
    monkeypatch.setattr(callbacks, "DEADLINE_S", LEASE_S)
    with closing(RawReceiver(say_nothing)) as silent:
        for _ in range(AT_ONCE):
            ended(silent.url)
        assert courier.round() == AT_ONCE
        served = ended(receiver.url)
        assert courier.round() == 0
        assert row(served).callback_tries == 0, "it is left to whoever has room"
    courier.finish()
    assert deliver(courier) == 1
    assert row(served).callback_settled_at is not None


def test_the_body_of_an_answer_is_not_read(receiver: Receiver, courier: Courier) -> None:
    most = 64 << 20
    sent: queue.SimpleQueue[int] = queue.SimpleQueue()

    def pour(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        poured = 0
        try:
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {most}\r\n\r\n".encode())
            while poured < most:
                poured += connection.send(bytes(1 << 16))
        finally:
            sent.put(poured)

    with closing(RawReceiver(pour)) as pouring:
        task_id = ended(pouring.url)
        assert deliver(courier) == 1
        assert row(task_id).callback_settled_at is not None
        assert row(task_id).callback_error is None
        assert sent.get(timeout=30) < most, "the connection was closed before its end"


def test_an_answer_that_drips_is_broken_off(
    receiver: Receiver, courier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "DEADLINE_S", 0.5)
    ended_early = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.settimeout(0.05)  # between two bytes, unless the courier hangs up
        connection.sendall(b"HTTP/1.1 204 No Content\r\n")
        for _ in range(100):
            connection.sendall(b"A: b\r\n")
            with suppress(TimeoutError):
                while connection.recv(1 << 16):
                    pass
                ended_early.set()
                return
        connection.sendall(b"\r\n")

    with closing(RawReceiver(drip)) as dripping:
        task_id = ended(dripping.url)
        assert deliver(courier) == 1
        assert "no answer within 0.5 s" in (row(task_id).callback_error or "")
        assert ended_early.wait(10)
    assert callbacks.DEADLINE_S < LEASE_S


def test_a_connection_is_used_once(receiver: Receiver, courier: Courier) -> None:
    """One that is kept is found by its address, though another host's certificate opened it."""
    for _ in range(2):
        ended(receiver.url)
        assert deliver(courier) == 1
    first, second = (receiver.calls.get(timeout=1) for _ in range(2))
    assert first.connection != second.connection


def test_the_tries_spread_over_a_day(receiver: Receiver, courier: Courier) -> None:
    receiver.statuses = [503] * TRIES
    task_id = ended(receiver.url)
    pauses_s = []
    for _ in range(TRIES - 1):
        make_due()
        assert deliver(courier) == 1
        pauses_s.append((row(task_id).callback_next_at - datetime.now(UTC)).total_seconds())
    assert pauses_s[0] < 10, "a receiver that restarts is soon tried again"
    assert 18 < sum(pauses_s) / 3600 < 29
    assert row(task_id).callback_settled_at is None
    make_due()
    assert deliver(courier) == 1
    assert row(task_id).callback_settled_at is not None


# --- what can never be posted ---------------------------------------------------------------

IMPOSSIBLE = (
    f"http://{'a' * 80}.example.com/",
    "http://a..b/",
    "http://ex\u0001ample.com/",
    "http://example.com/\u0001",
    "http://[::1/",
    "http://example.com:0/",
    "http://1.2.3.999/",
)


@pytest.mark.parametrize("url", IMPOSSIBLE)
def test_a_url_that_cannot_be_called_is_refused(url: str) -> None:
    override(callback_secret=SECRET)
    with pytest.raises(InvalidInput, match=r"options\.callback_url") as refused:
        callbacks.checked(Options(callback_url=url))
    assert refused.value.details[0]["field"] == "options.callback_url"
    override(callback_secret=None)


def test_one_that_was_accepted_is_settled_at_once(receiver: Receiver, courier: Courier) -> None:
    tasks = [ended_unchecked(Options(callback_url=url)) for url in IMPOSSIBLE]
    served = ended(receiver.url)
    assert deliver(courier) == len(tasks) + 1
    for task_id in tasks:
        assert row(task_id).callback_settled_at is not None
        assert "it can never be posted" in row(task_id).callback_error
    assert row(served).callback_error is None
    make_due()
    assert deliver(courier) == 0


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b::7f00:1",  # NAT64
        "64:ff9b:1::1",
        "2002:7f00:1::",  # 6to4
        "::7f00:1",
        "::ffff:7f00:1",
        "fec0::1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",  # Teredo
        "2001:db8::1",
        "ff0e::1",
    ],
)
def test_an_address_that_carries_another_is_not_public(address: str) -> None:
    options = Options(callback_url=f"http://[{address}]/")
    override(callback_secret=SECRET)
    with pytest.raises(InvalidInput, match="not a public address"):
        callbacks.checked(options)
    override(callback_hosts="::/0,0.0.0.0/0")
    assert callbacks.checked(options) is options
    override(callback_secret=None, callback_hosts=None)


@pytest.mark.parametrize("host", ["[2a00:1450:4001:812::200e]", "[::ffff:8.8.8.8]", "8.8.8.8"])
def test_public_addresses_are_called(host: str) -> None:
    override(callback_secret=SECRET)
    options = Options(callback_url=f"https://{host}/")
    assert callbacks.checked(options) is options
    override(callback_secret=None)


def test_a_secret_in_base64_signs_with_what_it_means(receiver: Receiver, courier: Courier) -> None:
    override(callback_secret=f"whsec_{base64.b64encode(SECRET.encode()).decode()}")
    headers = callbacks.sign("task", b"{}", at=1)
    digest = hmac.new(SECRET.encode(), b"task.1.{}", hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"


def test_who_settles_after_another_has_delivered_changes_nothing(receiver: Receiver) -> None:
    task_id = ended(receiver.url)
    with db.transaction() as connection:
        [late] = connection.execute(statements.take_callbacks(1, 0.0)).all()
        [quick] = connection.execute(statements.take_callbacks(1, 60.0)).all()
    for taken, settled in ((quick, True), (late, False)):
        tried = (task_id, taken.callback_tries)
        pause = timedelta(seconds=0)
        db.run(statements.settle_callback(*tried, settled=settled, error=None, pause=pause))
    with db.transaction() as connection:
        assert connection.execute(statements.take_callbacks(1, 60.0)).all() == []
