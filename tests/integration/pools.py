"""An agent for each kind of pool; run as a module, it is a worker of one of them."""

import sys
import time
from typing import Any

from celery.worker.control import Panel
from pydantic import BaseModel

from sutazai import keeper
from sutazai.__main__ import main
from sutazai.agent import Agent, Context, NoParams
from sutazai.errors import TimeLimitExceeded, Unavailable

prefork = Agent("in-prefork", port=8192, doc=__doc__, slots=(1, 2, 2))
threads = Agent("in-threads", port=8193, doc=__doc__, slots=(1, 2, 2), pool="threads")
solo = Agent("in-solo", port=8194, doc=__doc__, slots=(1, 1, 1), pool="solo")


class Seconds(BaseModel):
    seconds: float


class Done(BaseModel):
    attempt: int


def nap(params: Seconds, context: Context) -> Done:
    """Sleep the first time, whatever anybody says meanwhile."""
    until = time.monotonic() + (params.seconds if context.attempt == 1 else 0)
    while time.monotonic() < until:
        time.sleep(0.01)
    return Done(attempt=context.attempt)


def spin(params: NoParams, context: Context) -> Done:
    """Never end."""
    while True:
        time.sleep(0.01)


def nap_once(params: Seconds, context: Context) -> Done:
    """Sleep, and not again."""
    return nap(params, context)


def spin_first(params: NoParams, context: Context) -> Done:
    """Never end, unless it is tried again."""
    while context.attempt == 1:
        time.sleep(0.01)
    return Done(attempt=context.attempt)


for agent in (prefork, threads, solo):
    agent.action(time_limit_s=60)(nap)
    agent.action(time_limit_s=60, rerun_after_crash=False)(nap_once)
    agent.action(time_limit_s=1, max_attempts=2, retry_on=(Unavailable,))(spin)
    agent.action(time_limit_s=1, max_attempts=2, retry_on=(TimeLimitExceeded,))(spin_first)


@Panel.register(name="hang", type="control", help="Keep the worker's main thread for ever.")
def hang(state: Any, **_: Any) -> None:
    while True:
        time.sleep(1)


@Panel.register(name="fail", type="control", help="Break the loop of the worker's main thread.")
def fail(state: Any, **_: Any) -> None:
    def broken() -> None:
        raise ValueError("broken")

    state.consumer.hub.call_soon(broken)


@Panel.register(name="cling", type="control", help="Let the pool wait for what never comes.")
def cling(state: Any, **_: Any) -> None:
    keeper.DRAIN_S = 60.0
    state.consumer.pool.stop = lambda: time.sleep(60)


if __name__ == "__main__":
    # Tests need not take the minutes that a deployed worker is given.
    keeper.STUCK_S, keeper.STUCK_CHECK_S = 2.0, 0.5
    keeper.CANCEL_GRACE_S, keeper.DRAIN_S = 2.0, 1.0
    sys.argv[1:] = ["worker", *sys.argv[1:]]
    main()
