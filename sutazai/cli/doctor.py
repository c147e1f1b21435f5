"""`sutazai doctor`: what could be wrong, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Literal, NamedTuple

import httpx

from sutazai import db, migration, redis, statements
from sutazai.cli.operation import started
from sutazai.embedded import port_holder
from sutazai.errors import ConfigurationError, SutazaiError
from sutazai.settings import settings
from sutazai.tasks import load

# Unblocking clients of BRPOP can crash these servers (CVE of the use-after-free); Valkey reports
# redis_version 7.2.4 for compatibility and is not meant.
_FAULTY_REDIS = ((7, 2, 0), (8, 6, 2))


class Finding(NamedTuple):
    """One line of the doctor."""

    subject: str
    level: Literal["ok", "warning", "error"]
    text: str
    mend: str = ""


def examine() -> Iterator[Finding]:
    """Examine everything, in the order in which faults follow from each other."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "configuration": _configuration,
        "agents": _agents,
        "postgresql": _postgresql,
        "migrations": _migrations,
        "broker": _broker,
        "redis": _redis,
        "workers": _workers,
        "ports": _ports,
        "ollama": _ollama,
        "gpu": _gpu,
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except SutazaiError as error:
            yield Finding(subject, "error", str(error), "mend the lines above first")


def _configuration() -> Iterator[Finding]:
    try:
        settings().require_services()
    except ConfigurationError as error:
        yield Finding("configuration", "error", str(error), "run `sutazai up`")
        return
    yield Finding("configuration", "ok", f"home {settings().home}")


def _agents() -> Iterator[Finding]:
    found = load()
    yield Finding("agents", "ok", f"{len(found.agents)} declared")
    for reference, why in found.faults.items():
        yield Finding("agents", "error", f"{reference}: {why}", "mend the line it names")


def _postgresql() -> Iterator[Finding]:
    with db.transaction() as connection:
        version, read_only = connection.execute(statements.server()).one()
    if read_only == "on":
        yield Finding(
            "postgresql", "error", f"version {version}, read-only", "point to the primary server"
        )
    else:
        yield Finding("postgresql", "ok", f"version {version}")


def _migrations() -> Iterator[Finding]:
    current, wanted = migration.current(), migration.wanted()
    if current == wanted:
        yield Finding("migrations", "ok", f"revision {current}")
    else:
        yield Finding(
            "migrations", "error", f"revision {current}, not {wanted}", "run `sutazai migrate`"
        )


def _broker() -> Iterator[Finding]:
    """Examine a broker that is not the Redis of the next check."""
    if settings().broker_url == settings().signals_url:
        return
    from amqp.exceptions import NotFound, PreconditionFailed

    from sutazai.celery import app
    from sutazai.ringer import abandon, faults

    connection = app.connection_for_read()
    try:
        channel = connection.default_channel
        server = getattr(connection.connection, "server_properties", {})
        text = " ".join(str(server[key]) for key in ("product", "version") if key in server)
        yield Finding("broker", "ok", text or "answers")
        if not server:
            return
        for name in started(load().agents):
            queue = app.amqp.queues[name](channel)
            try:
                queue.queue_declare(passive=True)
                queue.queue_declare()  # which compares the arguments
            except NotFound:
                pass  # its worker makes it
            except PreconditionFailed as error:
                yield Finding(
                    "broker",
                    "error",
                    f"the queue {name} is not as we make it: {error.reply_text}",
                    "delete it: its worker makes it anew, and what waits on it is rung again",
                )
    except faults(connection) as error:
        why = f"does not answer: {error}"
        yield Finding("broker", "error", why, "start it, or mend SUTAZAI_BROKER_URL")
    finally:
        abandon(connection)


def _redis() -> Iterator[Finding]:
    if settings().signals_url is None:
        yield Finding(
            "redis",
            "warning",
            "none is configured: waiting clients are served by polling",
            "set SUTAZAI_REDIS_URL",
        )
        return
    info = redis.attempt(lambda client: client.info())
    if info is None:
        yield Finding("redis", "error", "does not answer", "start it, or mend SUTAZAI_REDIS_URL")
        return
    valkey = info.get("valkey_version")
    version = f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version')}"
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):
        yield Finding(
            "redis",
            "error",
            f"{version} evicts notices (maxmemory-policy {policy})",
            "set maxmemory-policy noeviction",
        )
    elif not valkey and _is_faulty(str(info.get("redis_version"))):
        yield Finding(
            "redis", "warning", f"{version} may crash when workers block", "upgrade the server"
        )
    else:
        yield Finding("redis", "ok", version)


def _is_faulty(version: str) -> bool:
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    return _FAULTY_REDIS[0] <= numbers <= _FAULTY_REDIS[1]


def _workers() -> Iterator[Finding]:
    with db.transaction() as connection:
        rows = connection.execute(statements.status(started(load().agents))).all()
    for row in rows:
        if row.workers:
            names = ", ".join(worker["id"] for worker in row.workers)
            yield Finding("workers", "ok", names)
        else:
            yield Finding(
                "workers",
                "error",
                f"{row.agent} has none that is alive",
                f"run `sutazai up` or `sutazai worker {row.agent}`",
            )
    for service, age in (("relay", rows[0].relay_age_s), ("beat", rows[0].beat_age_s)):
        if age is None or age > 15:
            yield Finding("workers", "error", f"no {service} runs", f"run `sutazai {service}`")


def _ports() -> Iterator[Finding]:
    for agent in map(load().get, started(load().agents)):
        port = settings().port(agent.name, agent.port)
        holder = port_holder(port, settings().bind)
        if holder is None:
            yield Finding(
                "ports",
                "warning",
                f"nothing listens on {port}, the front of {agent.name}",
                f"run `sutazai api {agent.name}`",
            )
        else:
            yield Finding("ports", "ok", f"{port} {agent.name}: {holder}")


def _ollama() -> Iterator[Finding]:
    url = settings().ollama_url
    try:
        version = httpx.get(f"{url}/api/version", timeout=2.0).json()["version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        yield Finding(
            "ollama",
            "warning",
            f"no model server answers at {url}; agents work by rules",
            "start Ollama, or set SUTAZAI_OLLAMA_URL",
        )
    else:
        yield Finding("ollama", "ok", f"version {version} at {url}")


def _gpu() -> Iterator[Finding]:
    if find_spec("pynvml") is None:
        yield Finding(
            "gpu", "warning", "NVML is not installed", "on a machine with a GPU: sutazai[gpu]"
        )
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Finding("gpu", "warning", f"none is visible: {error}", "nothing, if there is none")
    else:
        yield Finding("gpu", "ok", f"{pynvml.nvmlDeviceGetCount()} visible")
