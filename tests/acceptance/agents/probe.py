"""An agent that behaves badly on request, for tests of the whole system."""

import os
import time
from pathlib import Path

from pydantic import BaseModel, Field

from sutazai.agent import Agent, Context, Delegation, NoParams
from sutazai.errors import InvalidInput, Unavailable

agent = Agent("probe", port=8190, doc=__doc__, slots=(1, 2, 4))


class Seconds(BaseModel):
    seconds: float = Field(default=0.0, ge=0)


class Mark(BaseModel):
    path: str


class Done(BaseModel):
    pid: int
    attempt: int


def _done(context: Context) -> Done:
    return Done(pid=os.getpid(), attempt=context.attempt)


@agent.action(time_limit_s=120)
def nap(params: Seconds, context: Context) -> Done:
    """Sleep, and report progress."""
    until = time.monotonic() + params.seconds
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.05)
        context.progress(1 - (until - time.monotonic()) / params.seconds, "asleep")
    if context.cancelled:
        raise Unavailable("woken up")
    return _done(context)


@agent.action(time_limit_s=2)
def spin(params: NoParams, context: Context) -> Done:
    """Never end."""
    while True:
        pass


@agent.action()
def crash(params: NoParams, context: Context) -> Done:
    """Kill the process that runs this."""
    os.kill(os.getpid(), 9)
    return _done(context)


@agent.action(max_attempts=3, retry_on=(Unavailable,))
def flaky(params: Mark, context: Context) -> Done:
    """Fail the first time."""
    mark = Path(params.path)
    if not mark.exists():
        mark.touch()
        raise Unavailable("not yet")
    return _done(context)


@agent.action()
def refuse(params: NoParams, context: Context) -> Done:
    """Refuse."""
    raise InvalidInput("this input is never good")


@agent.action()
def pass_on(params: Seconds, context: Context) -> Done | Delegation:
    """Let a child do it."""
    return context.delegate("probe.nap", params)


@agent.action(time_limit_s=120)
def sleep_through(params: Seconds, context: Context) -> Done:
    """Sleep, and ignore that somebody cancelled it."""
    until = time.monotonic() + params.seconds
    while time.monotonic() < until:
        time.sleep(0.05)
    return _done(context)


@agent.action()
def leave(params: NoParams, context: Context) -> Done:
    """Exit."""
    raise SystemExit(3)
