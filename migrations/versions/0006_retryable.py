"""An index for what may be tried again, built while tasks go on."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # One that was interrupted has left an index that is never used.
        op.drop_index("tasks_retryable", "tasks", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "tasks_retryable",
            "tasks",
            ["agent", "state", "task_id"],
            postgresql_where=sa.text("state IN ('failed', 'cancelled')"),
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("tasks_retryable", "tasks", postgresql_concurrently=True)
