"""Celery as documented, with results in Redis."""

from benchmarks.peers.address import RESULTS
from benchmarks.peers.celery_app import KeepingInRedis, application

app = application(
    __name__,
    RESULTS,
)


@app.task
def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(KeepingInRedis):
    """This application."""

    def __init__(self) -> None:
        super().__init__(__name__, echo)
