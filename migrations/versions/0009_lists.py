"""Indexes for pages of tasks by action, state, label and time; built while tasks go on."""

import sqlalchemy as sa
from alembic import op

from sutazai.migration import build_index, drop_index

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_RETRYABLE = "state IN ('failed', 'cancelled')"
_HAS_PARENT = "parent_id IS NOT NULL"


def upgrade() -> None:
    build_index("tasks_listed", ["agent", "action", "state", "created_at", "task_id"])
    build_index(
        "tasks_error_code",
        ["agent", "state", sa.text("(error ->> 'code')"), "created_at", "task_id"],
        f"{_RETRYABLE} AND (error ->> 'code') IS NOT NULL",
    )
    build_index("tasks_children", ["parent_id", "created_at", "task_id"], _HAS_PARENT)
    for name in ("tasks_past", "tasks_live", "tasks_retryable", "tasks_parent"):
        drop_index(name)
    # Each step may find itself done: an interruption undoes none of those before it.
    with op.get_context().autocommit_block():
        op.create_table(
            "task_labels",
            sa.Column("agent", sa.Text, primary_key=True),
            sa.Column("name", sa.Text, primary_key=True),
            sa.Column("value", sa.Text, primary_key=True),
            sa.Column("created_at", sa.DateTime(timezone=True), primary_key=True),
            sa.Column("task_id", sa.Uuid, primary_key=True),
            if_not_exists=True,
        )
        for statement in (_ADD, _REMOVE, _ON_INSERT, _ON_DELETE, _FILL, _CLEAR):
            op.execute(statement)


def downgrade() -> None:
    build_index("tasks_live", ["agent", "task_id"], "state IN ('queued', 'running', 'waiting')")
    build_index("tasks_past", ["agent", "task_id"], "state IN ('succeeded', 'failed', 'cancelled')")
    build_index("tasks_retryable", ["agent", "state", "task_id"], _RETRYABLE)
    build_index("tasks_parent", ["parent_id"], _HAS_PARENT)
    for name in ("tasks_listed", "tasks_error_code", "tasks_children"):
        drop_index(name)
    for trigger in ("add_labels", "remove_labels"):
        op.execute(f"DROP TRIGGER {trigger} ON tasks")
        op.execute(f"DROP FUNCTION {trigger}()")
    op.drop_table("task_labels")


_ADD = """
    CREATE OR REPLACE FUNCTION add_labels() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO task_labels (agent, name, value, created_at, task_id)
        SELECT NEW.agent, label.key, label.value, NEW.created_at, NEW.task_id
        FROM jsonb_each_text(NEW.labels) AS label;
        RETURN NULL;
    END $$
"""

_REMOVE = """
    CREATE OR REPLACE FUNCTION remove_labels() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        DELETE FROM task_labels AS l USING jsonb_each_text(OLD.labels) AS label
        WHERE l.agent = OLD.agent AND l.name = label.key AND l.value = label.value
          AND l.created_at = OLD.created_at AND l.task_id = OLD.task_id;
        RETURN NULL;
    END $$
"""

_ON_INSERT = """
    CREATE OR REPLACE TRIGGER add_labels AFTER INSERT ON tasks
    FOR EACH ROW WHEN (NEW.labels <> '{}') EXECUTE FUNCTION add_labels()
"""

_ON_DELETE = """
    CREATE OR REPLACE TRIGGER remove_labels AFTER DELETE ON tasks
    FOR EACH ROW WHEN (OLD.labels <> '{}') EXECUTE FUNCTION remove_labels()
"""

# Those of before the trigger.
_FILL = """
    INSERT INTO task_labels (agent, name, value, created_at, task_id)
    SELECT agent, label.key, label.value, created_at, task_id
    FROM tasks CROSS JOIN jsonb_each_text(labels) AS label
    WHERE labels <> '{}'
    ON CONFLICT DO NOTHING
"""

# Of tasks that were deleted meanwhile. To lock them instead would keep them from being claimed.
_CLEAR = """
    DELETE FROM task_labels AS l
    WHERE NOT EXISTS (SELECT 1 FROM tasks AS t WHERE t.task_id = l.task_id)
"""
