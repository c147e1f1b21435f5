"""What `make bench` concludes from figures, and what its load generator counts."""

import inspect
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from benchmarks.explain import Sample, wanted
from benchmarks.load import fire, request
from benchmarks.measurement import (
    Chart,
    Curve,
    Finding,
    Measurement,
    Of,
    PeerLine,
    Run,
    Samples,
    Table,
    Target,
    at_least,
    at_most,
    measurement,
    number,
    registered,
)
from benchmarks.report import Place, report
from sutazai import statements
from sutazai.bell import TOGETHER_MAX
from sutazai.models import new_id

SMALL = """
    add_schedule advance_schedule all_schedules allow change_schedule declare_schedule discharge
    discharge_silent due_schedules enlist forget_schedules live_hosts live_workers lock_key
    lock_key_of lock_replay next_tick now predecessors prepare_prune prune_services prune_workers
    remove_schedule retire schedule server set_queue start_of_key take_schedule
"""
"""Statements on no table, or on one with a row a worker, a queue, a schedule or a key in use."""


def test_every_statement_on_a_table_that_grows_is_explained() -> None:
    some = [new_id() for _ in range(TOGETHER_MAX)]
    now = datetime.now(UTC)
    found = wanted(Sample(some, [(each, each) for each in some], some[0], now))
    explained = {name.split(" ")[0] for name in found}
    declared = {
        name
        for name, made in inspect.getmembers(statements, callable)
        if not isinstance(made, type)
        and getattr(made, "__module__", None) == statements.__name__
        and not name.startswith("_")
    }
    assert explained == declared - set(SMALL.split())
    assert declared >= set(SMALL.split())


def test_a_bar_is_held_against_the_median_and_its_baseline() -> None:
    ours = Samples([90, 1000, 100], "/s")
    target = Target("x", at_least(4, Of.RATIO), at_least(100), "them")
    row = target.row(ours, Samples([25, 25, 1], "/s"))
    assert row.ratio == 4
    assert target.first
    assert target.first.is_met(row)
    assert at_least(100).is_met(row)
    assert not at_most(99).is_met(row)
    assert at_most(75, Of.DIFFERENCE).is_met(row)
    assert not at_most(74, Of.DIFFERENCE).is_met(row)


def test_a_bar_beside_a_baseline_that_was_not_measured_is_not_met() -> None:
    row = Target("x", at_least(1, Of.RATIO), None, "them").row(Samples([5], "ms"))
    assert row.ratio is None
    assert not at_least(0, Of.RATIO).is_met(row)


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (99.96, "100.0"), (12.34, "12.3"), (0.01234, "0.0123")]
)
def test_numbers_are_written_with_the_digits_that_mean_something(value: float, text: str) -> None:
    assert number(value) == text


def test_a_name_is_measured_by_one_measurement() -> None:
    import benchmarks.measurements  # registers all

    assert "accept" in registered()
    with pytest.raises(ValueError, match="accept"):
        measurement("accept")(lambda run: Finding([]))
    assert benchmarks.measurements.accept.accept.__doc__


def test_the_report_says_what_was_met_and_what_could_not_be_measured() -> None:
    target = Target("drain", at_least(4, Of.RATIO), at_least(2000), "Celery")

    def drain(run: Run) -> Finding:
        """Drain."""
        return finding

    finding = Finding(
        rows=[target.row(Samples([1000, 1200, 1100], "/s"), Samples([200], "/s"))],
        peers=[
            PeerLine("Celery", "Redis", "no, no", drain=Samples([200], "/s")),
            PeerLine("arq", "Redis", "yes, no", fault="not installed"),
        ],
        tables=[Table(("a", "b"), [["1", "x|y"]])],
        charts=[Chart("curve", "Title", "x", "y", [Curve("ours", [1], [2])])],
    )
    known = {"drain": Measurement("drain", [target], drain)}
    text = report({"drain": finding}, {"trip": "RuntimeError: no"}, known, 3, Place(["Any 1"], 0.2))
    row = (
        "| drain | 1,100 /s (1,000 – 1,200) | 200 /s – Celery | 5.5 × | ≥ 4 × | yes "
        "| ≥ 2,000 /s | **no** |"
    )
    assert row in text
    assert "| arq | Redis | not installed | – | – | – | yes, no |" in text
    assert "trip could not be measured: RuntimeError: no" in text
    assert "| 1 | x/y |" in text
    assert "![Title](curve.png)" in text


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """Answer every second request with 503, in two pieces; give the address and what came."""
    seen: list[bytes] = []
    pieces = [
        (b"HTTP/1.1 202 x\r\nContent-Len", b"gth: 2\r\n\r\n{}"),
        (b"HTTP/1.1 503 x\r\ncontent-length: 4\r\n\r\n12", b"34"),
    ]

    def serve(link: socket.socket) -> None:
        with link:
            while raw := link.recv(65536):
                seen.append(raw)
                for piece in pieces[(len(seen) - 1) % 2]:
                    link.sendall(piece)

    def listen() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(link,)).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/process?a=1", seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_the_load_generator_counts_each_answer_once(server: tuple[str, list[bytes]]) -> None:
    url, seen = server
    found = fire(request("POST", url, {"a": 1}, Prefer="wait=1"), 1, total=10)
    assert found.statuses == {"202": 5, "503": 5}
    assert len(found.latencies) == len(seen) == 10
    assert found.lost == 0
    assert found.percentile_ms(50) <= found.percentile_ms(99)
    assert seen[0].startswith(b"POST /process?a=1 HTTP/1.1\r\n")
    assert b"Prefer: wait=1\r\n" in seen[0]
    assert seen[0].endswith(b'Content-Length: 8\r\n\r\n{"a": 1}')
    with pytest.raises(RuntimeError, match="503"):
        found.require("202")


def test_the_load_generator_counts_connections_that_end_early() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            for _ in range(3):
                listener.accept()[0].close()

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        found = fire(request("GET", url), 3, total=3)
        thread.join(10)
    assert found.lost == 3
    assert not found.latencies
