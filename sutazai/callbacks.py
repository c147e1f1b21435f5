"""Callbacks: an ended task is posted to the URL that its submission named, signed and with retries.

The relay delivers them. A row that has ended, names a URL and is not settled *is* a callback that
is due, so none can be lost between the end of a task and its delivery; one may be delivered twice.
The headers are those of Standard Webhooks (standardwebhooks.com): `webhook-id` is the task's id,
`webhook-signature` an HMAC-SHA256 of id, timestamp and body. Addresses that are not public are
refused, because the URL comes from whoever may submit a task.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import random
import socket
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx

from sutazai import db, log, payload, record, statements
from sutazai.errors import DatabaseUnavailable, InvalidInput, Unavailable
from sutazai.settings import settings
from sutazai.submission import Options

if TYPE_CHECKING:
    from sqlalchemy import Row

PAUSES_S = (5.0, 30.0, 300.0, 1800.0, 3600.0, 7200.0, 14_400.0, 28_800.0, 28_800.0)
"""After each try that failed, give or take a fifth: about a day, so that a receiver's bad night
loses nothing."""

TRIES = len(PAUSES_S) + 1

DEADLINE_S = 10.0
"""For a whole delivery, from the look-up of the name to the status."""

LEASE_S = 60.0
"""A delivery that takes longer, because its relay died, is begun again by another."""

AT_ONCE = 32
"""Deliveries under way in a relay; most of their time they wait for a receiver."""

FULL_S = 1.0
"""How long a round waits for one of them to end when there is room for none."""

_GONE = 410
"""The receiver says that it wants no more."""

_logger = log.get(__name__)


class NotDelivered(Unavailable):
    """The receiver did not take the callback."""


def checked(options: Options) -> Options:
    """Return options whose callback can be delivered; raises `InvalidInput`."""
    if options.callback_url is None:
        return options
    if not settings().callback_secret:
        raise _refusal("callbacks are signed: set SUTAZAI_CALLBACK_SECRET on fronts and relays")
    host = _read(options.callback_url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host == "localhost" and not _is_allowed(host, ipaddress.ip_address("127.0.0.1")):
            raise _refusal(_not_public(host)) from None
        return options  # a name is looked up when it is called, because it may change
    if not _is_allowed(host, address):
        raise _refusal(_not_public(host))
    return options


def _read(address: str) -> httpx.URL:
    """Read a URL; raises `InvalidInput` when nothing could ever be posted there."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise _refusal(str(error)) from None
    if not url.host or url.userinfo:
        raise _refusal("it must name a host, and no user")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise _refusal("its port is not between 1 and 65535")
    try:
        url.raw_host.decode().encode("idna")  # as the look-up will do
    except UnicodeError:
        raise _refusal("the host has a part that is empty or longer than 63 characters") from None
    return url


def _refusal(why: str) -> InvalidInput:
    message = f"options.callback_url: {why}."
    return InvalidInput(message, details=[{"field": "options.callback_url", "message": why}])


def _not_public(host: str) -> str:
    return f"{host} is not a public address; SUTAZAI_CALLBACK_HOSTS can allow it"


def _is_allowed(host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if _is_public(address):
        return True
    for entry in settings().callback_hosts:
        if "/" in entry:
            network = ipaddress.ip_network(entry)
            if address.version == network.version and address in network:
                return True
        elif entry in (host, str(address)):
            return True
    return False


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in _UNICAST or any(address in network for network in _TUNNELS)
    ):
        return False
    return address.is_global and not address.is_multicast


_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that is given to anybody (RFC 4291, 2.4); NAT64 and IPv4 within IPv6 lie outside."""

_TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/23"))
"""6to4 (RFC 3056), and Teredo with all else of special purpose: their packets may go to IPv4."""


# --- delivery -------------------------------------------------------------------------------


class Courier:
    """Delivers what is due, several at once; each relay has one."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="callback")
        self._under_way: set[Future[None]] = set()
        self._tls = httpx.create_ssl_context(trust_env=False)

    def round(self) -> int:
        """Begin to deliver as much of what is due as there is room for; return how many.

        It does not wait for deliveries to end, so that no receiver keeps another one waiting.
        """
        if not settings().callback_secret:
            return 0
        if len(self._under_way) >= AT_ONCE:
            wait(self._under_way, FULL_S, FIRST_COMPLETED)
        self._under_way = {delivery for delivery in self._under_way if not delivery.done()}
        room = AT_ONCE - len(self._under_way)
        due = db.run(statements.take_callbacks(room, LEASE_S)) if room else []
        self._under_way |= {self._threads.submit(self._deliver, row) for row in due}
        return len(due)

    def finish(self) -> None:
        """Wait until every delivery that was begun has ended."""
        wait(self._under_way)

    def close(self) -> None:
        """Finish, and end the threads."""
        self._threads.shutdown()

    def _deliver(self, due: Row[Any]) -> None:
        try:
            self._try(due)
        except DatabaseUnavailable as error:
            _logger.warning("waiting for PostgreSQL", task_id=str(due.task_id), reason=str(error))
        except Exception:
            _logger.exception("a callback was left to its lease", task_id=str(due.task_id))

    def _try(self, due: Row[Any]) -> None:
        [row] = db.run(statements.task(due.task_id))
        body = payload.dumps(record.task_json(row)).encode()
        error: str | None = None
        settled = True
        try:
            if self._post(due, body) == _GONE:
                error = "the receiver answered 410 Gone"
        except (InvalidInput, httpx.InvalidURL, UnicodeError) as fault:
            error = f"it can never be posted: {fault}"[:500]
        except Exception as fault:
            # Whatever it is counts as a try, or the row would be due for ever.
            error = f"{type(fault).__name__}: {fault}"[:500]
            settled = due.callback_tries >= TRIES
        pause_s = PAUSES_S[min(due.callback_tries, len(PAUSES_S)) - 1]
        pause = timedelta(seconds=pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - only jitter
        tried = (due.task_id, due.callback_tries)
        db.run(statements.settle_callback(*tried, settled=settled, error=error, pause=pause))
        if error is None:
            _logger.info("callback delivered", task_id=str(due.task_id))
        else:
            _logger.warning(
                "callback given up" if settled else "callback will be tried again",
                task_id=str(due.task_id),
                tries=due.callback_tries,
                error=error,
            )

    def _post(self, due: Row[Any], body: bytes) -> int:
        until = time.monotonic() + DEADLINE_S
        url = _read(due.callback_url)
        headers = sign(str(due.task_id), body) | {
            "Host": url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "sutazai",
        }
        # The address that was checked is the one that is called: a name could change in between.
        called = url.copy_with(host=_address(url))
        name = url.raw_host.decode()
        try:
            status = asyncio.run(self._send(called, name, headers, body, until - time.monotonic()))
        except TimeoutError:
            raise NotDelivered(f"no answer within {DEADLINE_S:g} s") from None
        if not httpx.codes.is_success(status) and status != _GONE:
            raise NotDelivered(f"the receiver answered {status}")
        return status

    async def _send(
        self, url: httpx.URL, name: str, headers: dict[str, str], body: bytes, within_s: float
    ) -> int:
        """Post once, and return the status without the answer's body, which may be endless.

        On an event loop, because only there can the whole of it be given one end. The connection
        is used once: one that is kept would be found again by its address, whatever the host whose
        certificate it was opened for.
        """
        client = httpx.AsyncClient(
            timeout=DEADLINE_S, follow_redirects=False, trust_env=False, verify=self._tls
        )
        async with asyncio.timeout(within_s), client:
            posting = client.stream(
                "POST", url, content=body, headers=headers, extensions={"sni_hostname": name}
            )
            async with posting as answer:
                return answer.status_code


_PORTS = {"http": 80, "https": 443}


def _address(url: httpx.URL) -> str:
    """Look a host up; raises `NotDelivered` when any of its addresses is not allowed."""
    name, port = url.raw_host.decode(), url.port or _PORTS[url.scheme]
    found = [entry[4][0] for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not _is_allowed(url.host, ipaddress.ip_address(address)):
            raise NotDelivered(_not_public(f"{url.host} ({address})"))
    return str(found[0])


def sign(task_id: str, body: bytes, at: int | None = None) -> dict[str, str]:
    """Return the headers by which the receiver knows that a callback is ours.

    at: seconds since the epoch, part of what is signed; default: now.
    """
    key = settings().callback_key
    timestamp = str(int(time.time()) if at is None else at)
    signed = b".".join((task_id.encode(), timestamp.encode(), body))
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": task_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
    }
