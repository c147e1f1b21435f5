"""Indexes of what has ended and of what has not, for pages of tasks; built while tasks go on."""

from sutazai.migration import build_index, drop_index

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    build_index("tasks_live", ["agent", "task_id"], "state IN ('queued', 'running', 'waiting')")
    build_index("tasks_past", ["agent", "task_id"], "state IN ('succeeded', 'failed', 'cancelled')")
    drop_index("tasks_agent")


def downgrade() -> None:
    build_index("tasks_agent", ["agent", "task_id"])
    drop_index("tasks_past")
    drop_index("tasks_live")
