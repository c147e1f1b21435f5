"""How many single tasks one front accepts a second."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.load import Answers, Request, fire, request
from benchmarks.measurement import (
    Chart,
    Curve,
    Finding,
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
)
from benchmarks.place import Site, pause_until, running_alone
from benchmarks.rival import by_hand, flower
from benchmarks.stores import Stores, stores
from tests.conftest import free_port

CONNECTIONS = 16
CURVE = (1, 4, 16, 64, 256)
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)

RATE = Target(
    "accept: `POST /process`, respond-async, 16 connections",
    first=at_least(4, Of.RATIO),
    then=at_least(9, Of.RATIO),
    against="by hand",
)
SLOWEST = Target("accept: p99 of the same", first=None, then=at_most(50), against="by hand")


@dataclass
class _Side:
    """One of those compared, at 16 connections."""

    title: str
    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    last: Answers = field(default_factory=Answers)

    def take(self, wanted: Request, seconds: float, status: str) -> None:
        fire(wanted, CONNECTIONS, total=200)
        self.last = fire(wanted, CONNECTIONS, seconds=seconds).require(status)
        self.rates.append(self.last.rate)
        self.p50.append(self.last.percentile_ms(50))
        self.p99.append(self.last.percentile_ms(99))

    @property
    def rate(self) -> Samples:
        return Samples(self.rates, "/s")

    @property
    def slowest(self) -> Samples:
        return Samples(self.p99, "ms")

    def cells(self) -> list[str]:
        return [self.title, str(self.rate), str(Samples(self.p50, "ms")), str(self.slowest)]


@measurement("accept", RATE, SLOWEST)
def accept(run: Run) -> Finding:
    """Hand single tasks to one front process, each durable before its answer.

    The baseline is FastAPI, one INSERT and one `.delay()` on Celery with Redis, one uvicorn process
    with its threads. On both sides nothing works the tasks off meanwhile; a second table shows both
    with their two worker processes at work. Each round measures one after the other.
    """
    seconds = run.seconds(8)
    ours, hand = _Side("ours"), _Side("by hand")
    busy_ours, busy_hand = _Side("ours, worked off meanwhile"), _Side("by hand, the same")
    sent = _Side("Flower's async-apply")
    curves: dict[str, list[float]] = {"ours": [], "by hand": []}
    with ExitStack() as stack:
        site = stack.enter_context(running_alone(run.folder))
        own = stack.enter_context(stores(run.folder))
        most = _most(own, seconds)
        run.say(f"the load generator itself: {most:,.0f} requests/s")
        for _ in range(run.rounds):
            _one_round(run, site, own, [ours, hand, sent], seconds)
        with site.without_worker(), by_hand(own) as request_by_hand:
            for connections in CURVE:
                for label, wanted in (
                    ("ours", site.accept_request()),
                    ("by hand", request_by_hand),
                ):
                    found = fire(wanted, connections, seconds=run.seconds(4))
                    curves[label].append(found.rate)
                    run.say(f"{connections} connections, {label}: {found.rate:,.0f}/s")
        _busy_round(site, own, busy_ours, busy_hand, seconds)
    sides = [ours, hand, sent, busy_ours, busy_hand]
    return Finding(
        rows=[RATE.row(ours.rate, hand.rate), SLOWEST.row(ours.slowest, hand.slowest)],
        peers=[
            PeerLine("by hand: FastAPI + INSERT + `.delay()`", "–", "–", hand.rate),
            PeerLine("Flower's `POST /api/task/async-apply`", "Redis", "no, no", sent.rate),
        ],
        tables=[
            Table(("16 connections", "rate", "p50", "p99"), [side.cells() for side in sides]),
            Table(
                ("connections", *map(str, CURVE)),
                [
                    [f"{label}, requests/s", *(number(rate) for rate in rates)]
                    for label, rates in curves.items()
                ],
            ),
        ],
        notes=[f"The load generator reaches {most:,.0f} requests/s against a constant server."],
        charts=[
            Chart(
                "accept_throughput",
                "Accepting single tasks",
                "connections",
                "requests/s",
                [Curve(label, CURVE, rates) for label, rates in curves.items()],
            ),
            Chart(
                "accept_latency",
                "Latency of accepting, 16 connections",
                "percentile",
                "ms",
                [
                    Curve(
                        side.title,
                        PERCENTILES,
                        [side.last.percentile_ms(percent) for percent in PERCENTILES],
                    )
                    for side in (ours, hand)
                ],
                log_x=False,
                log_y=True,
            ),
        ],
    )


def _one_round(run: Run, site: Site, own: Stores, sides: list[_Side], seconds: float) -> None:
    ours, hand, sent = sides
    site.clear()
    with site.without_worker():
        ours.take(site.accept_request(), seconds, "202")
    own.clear()
    with by_hand(own) as wanted:
        hand.take(wanted, seconds, "202")
    with flower(own) as wanted:
        sent.take(wanted, seconds, "200")
    run.say(f"ours {ours.rates[-1]:,.0f}/s, by hand {hand.rates[-1]:,.0f}/s")


def _busy_round(site: Site, own: Stores, ours: _Side, hand: _Side, seconds: float) -> None:
    site.clear()
    ours.take(site.accept_request(), seconds, "202")
    own.clear()
    with by_hand(own, worker=True) as wanted:
        hand.take(wanted, seconds, "202")


def _most(own: Stores, seconds: float) -> float:
    """Return what the load generator reaches against a server that always says the same."""
    port = free_port()
    with own.started([sys.executable, "-m", "benchmarks.load", str(port)], "constant"):
        pause_until(lambda: _listens(port), 10, "the constant server listens", every_s=0.05)
        wanted = request("POST", f"http://127.0.0.1:{port}/process", {"action": "echo"})
        return fire(wanted, CONNECTIONS, seconds=min(seconds, 3)).require("202").rate


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
