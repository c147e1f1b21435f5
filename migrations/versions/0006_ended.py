"""Indexes of what has ended: to be tried again, and to be pruned; built while tasks go on."""

from sutazai.migration import build_index, drop_index

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_ENDED = "finished_at IS NOT NULL"


def upgrade() -> None:
    build_index(
        "tasks_retryable", ["agent", "state", "task_id"], "state IN ('failed', 'cancelled')"
    )
    build_index("tasks_ended", ["agent", "finished_at"], _ENDED)
    drop_index("tasks_finished")


def downgrade() -> None:
    build_index("tasks_finished", ["finished_at"], _ENDED)
    drop_index("tasks_ended")
    drop_index("tasks_retryable")
