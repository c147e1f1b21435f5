"""Indexes for pages of tasks by action, state, label and time; built while tasks go on."""

import sqlalchemy as sa
from alembic import op

from sutazai.migration import build_index, drop_index

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_RETRYABLE = "state IN ('failed', 'cancelled')"


def upgrade() -> None:
    build_index("tasks_listed", ["agent", "action", "state", "created_at", "task_id"])
    build_index(
        "tasks_retryable",
        ["agent", "state", sa.text("(error ->> 'code')"), "created_at", "task_id"],
        _RETRYABLE,
    )
    drop_index("tasks_past")
    drop_index("tasks_live")
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
        for statement in (_ADD, _REMOVE, _ON_INSERT, _ON_DELETE):
            op.execute(statement)
    op.execute(_FILL)


def downgrade() -> None:
    build_index("tasks_live", ["agent", "task_id"], "state IN ('queued', 'running', 'waiting')")
    build_index("tasks_past", ["agent", "task_id"], "state IN ('succeeded', 'failed', 'cancelled')")
    build_index("tasks_retryable", ["agent", "state", "task_id"], _RETRYABLE)
    drop_index("tasks_listed")
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

# Those of before the trigger. Locked, so that none is deleted between its reading and its label's
# writing; the lock lets their other changes pass.
_FILL = """
    WITH labelled AS (
        SELECT agent, labels, created_at, task_id FROM tasks WHERE labels <> '{}' FOR KEY SHARE
    )
    INSERT INTO task_labels (agent, name, value, created_at, task_id)
    SELECT agent, label.key, label.value, created_at, task_id
    FROM labelled CROSS JOIN jsonb_each_text(labels) AS label
    ON CONFLICT DO NOTHING
"""
