"""Tasks that run alone because they saw their worker die; an index of children that go on."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "tasks", sa.Column("alone", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.execute("UPDATE tasks SET alone = true WHERE crashes > 0 AND finished_at IS NULL")
    op.drop_index("tasks_suspect", "tasks")
    op.create_index(
        "tasks_suspect",
        "tasks",
        ["worker_id"],
        postgresql_where=sa.text("state = 'running' AND alone"),
    )
    op.create_index(
        "tasks_unfinished_child",
        "tasks",
        ["parent_id"],
        postgresql_where=sa.text("parent_id IS NOT NULL AND finished_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("tasks_unfinished_child", "tasks")
    op.drop_index("tasks_suspect", "tasks")
    op.create_index(
        "tasks_suspect",
        "tasks",
        ["worker_id"],
        postgresql_where=sa.text("state = 'running' AND crashes > 0"),
    )
    op.drop_column("tasks", "alone")
