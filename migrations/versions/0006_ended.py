"""Indexes of what has ended: to be tried again, and to be pruned; built while tasks go on."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_ENDED = sa.text("finished_at IS NOT NULL")


def upgrade() -> None:
    with op.get_context().autocommit_block():
        _build(
            "tasks_retryable",
            ["agent", "state", "task_id"],
            sa.text("state IN ('failed', 'cancelled')"),
        )
        _build("tasks_ended", ["agent", "finished_at"], _ENDED)
        _drop("tasks_finished")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        _build("tasks_finished", ["finished_at"], _ENDED)
        _drop("tasks_ended")
        _drop("tasks_retryable")


def _build(name: str, columns: list[str], condition: sa.TextClause) -> None:
    _drop(name)  # building that was interrupted has left an index that is never used
    op.create_index(
        name, "tasks", columns, postgresql_where=condition, postgresql_concurrently=True
    )


def _drop(name: str) -> None:
    op.drop_index(name, "tasks", if_exists=True, postgresql_concurrently=True)
