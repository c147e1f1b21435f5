"""What a user would write by hand: FastAPI, one INSERT, one `.delay()`."""

from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from sqlalchemy import create_engine, text

from benchmarks.peers.address import SQLALCHEMY
from benchmarks.peers.celery_redis import echo

app = FastAPI()
engine = create_engine(SQLALCHEMY, pool_size=10, max_overflow=20)
with engine.begin() as opened:
    opened.execute(
        text(
            "CREATE TABLE IF NOT EXISTS by_hand (id uuid PRIMARY KEY, params jsonb, state text, "
            "created_at timestamptz DEFAULT now())"
        )
    )


@app.post("/process", status_code=202)
def process(body: dict[str, Any]) -> dict[str, str]:
    """Store the task and hand it to Celery."""
    task_id = str(uuid4())
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO by_hand (id, params, state) VALUES (:id, '{}', 'queued')"),
            {"id": task_id},
        )
    echo.apply_async((body.get("number", 1),), task_id=task_id)
    return {"task_id": task_id}
