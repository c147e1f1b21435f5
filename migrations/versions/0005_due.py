"""One index for all that is due, also when it was rung, and one for old ticks."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_DUE = ["agent", sa.literal_column("priority DESC"), "task_id"]


def upgrade() -> None:
    op.drop_index("tasks_unrung", "tasks")
    op.create_index(
        "tasks_due",
        "tasks",
        _DUE,
        postgresql_where=sa.text("state = 'queued' AND next_ring_at IS NOT NULL"),
    )
    op.drop_index("tasks_finished_scheduled", "tasks")
    op.create_index(
        "tasks_finished_tick",
        "tasks",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL AND tick_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("tasks_finished_tick", "tasks")
    op.create_index(
        "tasks_finished_scheduled",
        "tasks",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL AND scheduled_by IS NOT NULL"),
    )
    op.drop_index("tasks_due", "tasks")
    op.create_index(
        "tasks_unrung",
        "tasks",
        _DUE,
        postgresql_where=sa.text("state = 'queued' AND rings = 0 AND next_ring_at IS NOT NULL"),
    )
