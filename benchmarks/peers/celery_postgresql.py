"""Celery as documented, with results in PostgreSQL."""

from benchmarks.peers.address import SQLALCHEMY
from benchmarks.peers.celery_app import KeepingInPostgreSQL, application

app = application(
    __name__,
    f"db+{SQLALCHEMY}",
)


@app.task
def echo(number: int) -> int:
    """Return the number."""
    return number


class Measured(KeepingInPostgreSQL):
    """This application."""

    def __init__(self) -> None:
        super().__init__(__name__, echo)
