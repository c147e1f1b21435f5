"""What keeps promises: idempotency and concurrency keys, events, callbacks, totals."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "concurrency_keys",
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("slots", sa.Integer(), server_default="1", nullable=False),
        sa.Column("rate_per_s", sa.Double(), nullable=True),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("agent", "key", name=op.f("concurrency_keys_pkey")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("principal", "agent", "key", name=op.f("idempotency_keys_pkey")),
    )
    op.create_index("idempotency_keys_task", "idempotency_keys", ["task_id"])
    op.create_table(
        "task_events",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "event_id", name=op.f("task_events_pkey")),
    )
    op.create_table(
        "totals",
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("tasks", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("agent", "action", "state", name=op.f("totals_pkey")),
    )
    op.add_column(
        "queues",
        sa.Column("draining", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.add_column("tasks", sa.Column("concurrency_key", sa.Text(), nullable=True))
    op.add_column(
        "tasks", sa.Column("held", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.add_column("tasks", sa.Column("callback_url", sa.Text(), nullable=True))
    op.add_column(
        "tasks", sa.Column("callback_tries", sa.Integer(), server_default="0", nullable=False)
    )
    op.add_column("tasks", sa.Column("callback_next_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "tasks", sa.Column("callback_settled_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.add_column("tasks", sa.Column("callback_error", sa.Text(), nullable=True))
    op.create_index(
        "tasks_callback",
        "tasks",
        ["finished_at"],
        postgresql_where=sa.text(
            "callback_url IS NOT NULL AND finished_at IS NOT NULL AND callback_settled_at IS NULL"
        ),
    )
    op.create_index(
        "tasks_held",
        "tasks",
        ["agent", "concurrency_key", sa.literal_column("priority DESC"), "task_id"],
        postgresql_where=sa.text("state = 'queued' AND held"),
    )
    op.create_index(
        "tasks_key",
        "tasks",
        ["agent", "concurrency_key"],
        postgresql_where=sa.text("concurrency_key IS NOT NULL AND finished_at IS NULL"),
    )
    op.create_index(
        "tasks_suspect",
        "tasks",
        ["worker_id"],
        postgresql_where=sa.text("state = 'running' AND crashes > 0"),
    )
    op.create_index(
        "tasks_retry_of",
        "tasks",
        ["retry_of"],
        postgresql_where=sa.text("retry_of IS NOT NULL"),
    )
    op.drop_index("tasks_not_due", "tasks")
    op.create_index(
        "tasks_not_due",
        "tasks",
        ["run_at"],
        postgresql_where=sa.text("state = 'queued' AND next_ring_at IS NULL AND NOT held"),
    )


def downgrade() -> None:
    op.drop_index("tasks_retry_of", "tasks")
    op.drop_index("tasks_suspect", "tasks")
    op.drop_index("tasks_not_due", "tasks")
    op.create_index(
        "tasks_not_due",
        "tasks",
        ["run_at"],
        postgresql_where=sa.text("state = 'queued' AND next_ring_at IS NULL"),
    )
    op.drop_index("tasks_key", "tasks")
    op.drop_index("tasks_held", "tasks")
    op.drop_index("tasks_callback", "tasks")
    op.drop_column("tasks", "callback_error")
    op.drop_column("tasks", "callback_settled_at")
    op.drop_column("tasks", "callback_next_at")
    op.drop_column("tasks", "callback_tries")
    op.drop_column("tasks", "callback_url")
    op.drop_column("tasks", "held")
    op.drop_column("tasks", "concurrency_key")
    op.drop_column("queues", "draining")
    op.drop_table("totals")
    op.drop_table("task_events")
    op.drop_index("idempotency_keys_task", table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
    op.drop_table("concurrency_keys")
