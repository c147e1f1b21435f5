"""Celery as a careful user sets it up who wants to lose nothing."""

from benchmarks.peers.address import SQLALCHEMY
from benchmarks.peers.celery_app import KeepingInPostgreSQL, application

app = application(
    __name__,
    f"db+{SQLALCHEMY}",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_track_started=True,
)


@app.task
def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(KeepingInPostgreSQL):
    """This application."""

    def __init__(self) -> None:
        super().__init__(__name__, echo)
