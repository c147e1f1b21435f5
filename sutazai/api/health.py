"""`GET /health`: whether the agent's work is being done, told from rows, never by asking workers.

Unhealthy: no live worker, PostgreSQL away, or due tasks that nobody claims. Degraded: work is
done, but something should be looked at. Every reason is a sentence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import RedisError

from sutazai import log, redis, statements
from sutazai.agent import Agent
from sutazai.api import store
from sutazai.api.cached import Cached
from sutazai.bell import Bell
from sutazai.errors import DatabaseUnavailable
from sutazai.settings import settings

if TYPE_CHECKING:
    from sqlalchemy import Row

Status = Literal["healthy", "degraded", "unhealthy"]

OK, ABSENT = "ok", "absent"

DATABASE_WITHIN_S = 1.7
"""The whole answer is promised within 2 s."""

CHECK_WITHIN_S = 1.0
OWN_CHECK_WITHIN_S = 1.7
CHECK_FRESH_S = 2.0
OWN_CHECK_FRESH_S = 5.0

NOT_CONSUMING_S = 60.0

_DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "sentinel": 26379}

_logger = log.get(__name__)


_QUEUE_FIELDS = ("depth", "oldest_age_s", "paused", "draining")


@dataclass
class Report:
    """What was found; `reasons` say why it is not healthy."""

    status: Status = "healthy"
    workers: list[dict[str, Any]] = field(default_factory=list)
    queue: dict[str, Any] = field(
        default_factory=lambda: {
            "depth": None,
            "oldest_age_s": None,
            "paused": None,
            "draining": None,
        }
    )
    checks: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def degrade(self, reason: str) -> None:
        """Note something that should be looked at."""
        self.reasons.append(reason)
        if self.status == "healthy":
            self.status = "degraded"

    def fail(self, reason: str) -> None:
        """Note something that keeps the work from being done."""
        self.reasons.insert(0, reason)
        self.status = "unhealthy"


class Health:
    """The health of one agent; checks of other services are shared by all who ask within 2 s."""

    def __init__(self, agent: Agent, bell: Bell | None) -> None:
        self._agent = agent
        self._broker = _cached(lambda: _check_broker(bell, agent.name))
        self._redis = _cached(_check_redis)
        self._own = {name: _own_check(name, check) for name, check in agent.health_checks.items()}

    async def report(self) -> Report:
        """Find out how the agent does."""
        names = ("broker", "redis", *self._own)
        checks = (self._broker, self._redis, *self._own.values())
        row, *said = await asyncio.gather(self._row(), *(check.get() for check in checks))
        answers: dict[str, str] = dict(zip(names, said, strict=True))
        return assess(self._agent.name, row, answers)

    async def body(self) -> tuple[Report, dict[str, Any]]:
        """Return the report, and as the JSON object that `GET /health` answers."""
        report = await self.report()
        return report, {
            "status": report.status,
            "agent": self._agent.name,
            "port": settings().port(self._agent.name, self._agent.port),
            "timestamp": datetime.now(UTC),
            "workers": report.workers,
            "queue": report.queue,
            "checks": report.checks,
            "reasons": report.reasons,
        }

    async def _row(self) -> Row[Any] | None:
        try:
            return await read_status(self._agent.name)
        except DatabaseUnavailable:
            return None


async def read_status(agent: str) -> Row[Any]:
    """Return an agent's row of `statements.status`; raises `DatabaseUnavailable`."""
    [row] = await store.rows(statements.status([agent]), within_s=DATABASE_WITHIN_S)
    return row


# --- what the findings mean -----------------------------------------------------------------


def assess(agent: str, row: Any, answers: Mapping[str, str]) -> Report:
    """Judge an agent by its row (None: PostgreSQL is away) and what the checks said."""
    report = Report()
    broker, signals = answers["broker"], answers["redis"]
    report.checks = {
        "postgresql": OK if row is not None else "does not answer",
        "broker": broker,
        "redis": signals,
        "relay_age_s": None,
        "beat_age_s": None,
    }
    if row is None:
        report.fail("PostgreSQL does not answer, so nothing can be accepted.")
    else:
        _assess_row(report, agent, row, broker_ok=broker == OK)
    if broker != OK:
        report.degrade(f"The broker {broker}; tasks are accepted and start when it is back.")
    if signals not in (OK, ABSENT):
        report.degrade(f"Redis {signals}; answers come a little later, and live views stand still.")
    for name, said in answers.items():
        if name not in ("broker", "redis"):
            report.checks[name] = said
            if said not in (OK, ABSENT):
                report.degrade(f"The check {name} says: {said}.")
    return report


def _assess_row(report: Report, agent: str, row: Any, *, broker_ok: bool) -> None:
    report.workers = [_worker(worker) for worker in row.workers or []]
    report.queue = {
        "depth": row.depth,
        "oldest_age_s": _rounded(row.oldest_age_s),
        "paused": row.paused,
        "draining": row.draining,
    }
    report.checks["relay_age_s"] = _rounded(row.relay_age_s)
    report.checks["beat_age_s"] = _rounded(row.beat_age_s)
    if row.paused:
        report.degrade(f"The queue {agent} is paused: no task is started.")
    if row.draining:
        report.degrade(f"The queue {agent} drains: no new task is accepted.")
    _assess_service(report, "The relay", row.relay_age_s, "lost notices are not rung again")
    _assess_service(report, "Beat", row.beat_age_s, "schedules do not run")
    if not row.workers:
        report.fail(_no_worker(row.last_seen_s))
        return
    deaf = [worker["id"] for worker in row.workers if not worker["consuming"]]
    if deaf:
        report.degrade(f"{', '.join(deaf)} was told to stop taking tasks (consumer cancelled).")
    if broker_ok and not row.paused and _is_stuck(row):
        report.fail(
            f"Due tasks wait for {row.oldest_age_s:.0f} s although a worker has free slots "
            "and the broker answers."
        )


def _is_stuck(row: Any) -> bool:
    """Whether a worker that could has claimed nothing for a minute, with tasks waiting as long."""
    return (row.oldest_age_s or 0) > NOT_CONSUMING_S and any(
        worker["consuming"]
        and not worker["alone"]  # beside a suspect nothing is started
        and worker["running"] < worker["slots"]
        and worker["idle_s"] > NOT_CONSUMING_S
        for worker in row.workers
    )


def _assess_service(report: Report, name: str, age_s: Any, effect: str) -> None:
    if age_s is None:
        report.degrade(f"{name} does not run: {effect}.")
    elif age_s > statements.SERVICE_DEAD_S:
        report.degrade(f"{name} has been silent for {age_s:.0f} s: {effect}.")


def _no_worker(last_seen_s: Any) -> str:
    if last_seen_s is None:
        return "No live worker; none was ever seen."
    return f"No live worker, last seen {last_seen_s:.0f} s ago."


def _worker(worker: Mapping[str, Any]) -> dict[str, Any]:
    names = ("id", "host", "pid", "heartbeat_age_s", "slots", "running")
    return {**{name: worker[name] for name in names}} | {
        "heartbeat_age_s": _rounded(worker["heartbeat_age_s"])
    }


def _rounded(seconds: Any) -> float | None:
    return None if seconds is None else round(float(seconds), 3)


# --- checks of other services ---------------------------------------------------------------


def _cached(check: Callable[[], Any]) -> Cached[str]:
    return Cached(
        check, fresh_s=CHECK_FRESH_S, within_s=CHECK_WITHIN_S + 0.2, late="does not answer"
    )


async def check_services(bell: Bell | None, agent: str) -> dict[str, str]:
    """Ask the broker, by the queue of an agent, and Redis how they are, once and now."""
    broker, signals = await asyncio.gather(_check_broker(bell, agent), _check_redis())
    return {"broker": broker, "redis": signals}


async def _check_redis() -> str:
    client = redis.asynchronous()
    if client is None:
        return ABSENT
    return await _ping(client)


async def _check_broker(bell: Bell | None, agent: str) -> str:
    url = settings().broker_url or ""
    if url.startswith("redis"):
        return await _ping(Redis.from_url(url, socket_connect_timeout=CHECK_WITHIN_S))
    if bell is None:
        return await _connect(url)
    # Connecting alone proves nothing: a frozen broker's machine goes on to take connections.
    depth = await asyncio.to_thread(bell.depth, agent)
    return OK if depth is not None else "does not answer"


async def _ping(client: Redis) -> str:
    try:
        async with client, asyncio.timeout(CHECK_WITHIN_S):
            await client.ping()
    except (RedisError, OSError, TimeoutError):
        return "does not answer"
    return OK


async def _connect(url: str) -> str:
    parts = urlsplit(url)
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    try:
        async with asyncio.timeout(CHECK_WITHIN_S):
            _, writer = await asyncio.open_connection(parts.hostname, port)
        writer.close()
    except (OSError, TimeoutError):
        return "does not answer"
    return OK


def _own_check(name: str, check: Callable[[], str]) -> Cached[str]:
    async def ask() -> str:
        began = time.monotonic()
        try:
            return await asyncio.to_thread(check)
        except Exception as error:
            _logger.warning("a health check failed", check=name, exc_info=error)
            return f"failed after {time.monotonic() - began:.1f} s ({type(error).__name__})"

    late = f"no answer within {OWN_CHECK_WITHIN_S:g} s"
    return Cached(ask, fresh_s=OWN_CHECK_FRESH_S, within_s=OWN_CHECK_WITHIN_S, late=late)
