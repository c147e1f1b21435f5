"""Does nothing, so that what is measured is all but the work."""

from pydantic import BaseModel

from sutazai.agent import Agent, Context

agent = Agent("echo", port=8192, doc=__doc__, slots=(2, 2, 2))


class Number(BaseModel):
    """What comes, and goes again."""

    number: int = 0


@agent.action()
def echo(params: Number, context: Context) -> Number:
    """Return the number."""
    return params
