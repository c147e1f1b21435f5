"""Callbacks: an ended task is posted to the URL that its submission named, signed and with retries.

The relay delivers them. A row that has ended, names a URL and is not settled *is* a callback that
is due, so none can be lost between the end of a task and its delivery; one may be delivered twice.
The headers are those of Standard Webhooks (standardwebhooks.com): `webhook-id` is the task's id,
`webhook-signature` an HMAC-SHA256 of id, timestamp and body. Addresses that are not public are
refused, because the URL comes from whoever may submit a task.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import httpx

from sutazai import db, log, payload, record, statements
from sutazai.errors import InvalidInput, Unavailable
from sutazai.settings import settings
from sutazai.submission import Options

if TYPE_CHECKING:
    from sqlalchemy import Row

PAUSES_S = (5.0, 30.0, 300.0, 1800.0, 3600.0, 7200.0, 14_400.0, 28_800.0, 28_800.0)
"""After each try that failed, give or take a fifth: about a day, so that a receiver's bad night
loses nothing."""

TRIES = len(PAUSES_S) + 1

TIMEOUT_S = 10.0

LEASE_S = 60.0
"""A delivery that takes longer, because its relay died, is begun again by another."""

AT_ONCE = 8

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
        self._client = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)

    def round(self) -> int:
        """Take what is due and deliver it; return how many were tried."""
        if not settings().callback_secret:
            return 0
        due = db.run(statements.take_callbacks(AT_ONCE, LEASE_S))
        list(self._threads.map(self._deliver, due))
        return len(due)

    def close(self) -> None:
        """End the threads and connections."""
        self._threads.shutdown()
        self._client.close()

    def _deliver(self, due: Row[Any]) -> None:
        error: str | None = None
        settled = True
        try:
            status = self._post(due)
            if status == _GONE:
                error = "the receiver answered 410 Gone"
        except (InvalidInput, httpx.InvalidURL, UnicodeError) as fault:
            error = f"it can never be posted: {fault}"[:500]
        except (NotDelivered, httpx.HTTPError, OSError) as fault:
            error = f"{type(fault).__name__}: {fault}"[:500]
            settled = due.callback_tries >= TRIES
        pause_s = PAUSES_S[min(due.callback_tries, len(PAUSES_S)) - 1]
        pause = timedelta(seconds=pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - only jitter
        db.run(statements.settle_callback(due.task_id, settled=settled, error=error, pause=pause))
        if error is None:
            _logger.info("callback delivered", task_id=str(due.task_id))
        else:
            _logger.warning(
                "callback given up" if settled else "callback will be tried again",
                task_id=str(due.task_id),
                tries=due.callback_tries,
                error=error,
            )

    def _post(self, due: Row[Any]) -> int:
        [row] = db.run(statements.task(due.task_id))
        body = payload.dumps(record.task_json(row)).encode()
        url = _read(due.callback_url)
        host = url.host
        headers = sign(str(due.task_id), body) | {
            "Host": url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "sutazai",
        }
        # The address that was checked is the one that is called: a name could change in between.
        answer = self._client.post(
            url.copy_with(host=_address(host, url.port or _PORTS[url.scheme])),
            content=body,
            headers=headers,
            extensions={"sni_hostname": host},
        )
        if not answer.is_success and answer.status_code != _GONE:
            raise NotDelivered(f"the receiver answered {answer.status_code}")
        return answer.status_code


_PORTS = {"http": 80, "https": 443}


def _address(host: str, port: int) -> str:
    """Look a host up; raises `NotDelivered` when any of its addresses is not allowed."""
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not _is_allowed(host, ipaddress.ip_address(address)):
            raise NotDelivered(_not_public(f"{host} ({address})"))
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
