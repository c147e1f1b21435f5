"""Does small things that can be counted afterwards, and misbehaves on request."""

import os
import time
from datetime import timedelta

from pydantic import BaseModel, Field
from sqlalchemy import text

from sutazai.agent import Agent, Context, Delegation, NoParams

agent = Agent("target", port=8191, doc=__doc__, slots=(1, 2, 4))


class Seconds(BaseModel):
    seconds: float = Field(default=0.0, ge=0)


class Done(BaseModel):
    attempt: int


@agent.action(time_limit_s=60)
def work(params: Seconds, context: Context) -> Done:
    """Sleep, unless cancelled, and leave one row with the outcome."""
    until = time.monotonic() + params.seconds
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.01)
    _leave_effect(context)
    return Done(attempt=context.attempt)


@agent.action(time_limit_s=60, every=timedelta(seconds=1))
def tick(params: NoParams, context: Context) -> Done:
    """Leave one row with the outcome of each second's task."""
    _leave_effect(context)
    return Done(attempt=context.attempt)


def _leave_effect(context: Context) -> None:
    context.write(
        text("INSERT INTO effects (task_id) VALUES (:task_id)").bindparams(task_id=context.task_id)
    )


@agent.action(time_limit_s=60)
def pass_on(params: Seconds, context: Context) -> Done | Delegation:
    """Let a child do it."""
    return context.delegate("target.work", params)


@agent.action(time_limit_s=2)
def spin(params: NoParams, context: Context) -> Done:
    """Never end."""
    while True:
        pass


@agent.action(time_limit_s=60)
def crash(params: NoParams, context: Context) -> Done:
    """Kill the process that runs this."""
    os.kill(os.getpid(), 9)
    return Done(attempt=context.attempt)


@agent.action(time_limit_s=60)
def nothing(params: NoParams, context: Context) -> Done:
    """Do nothing, so that its outcome may be recorded together with others."""
    return Done(attempt=context.attempt)
