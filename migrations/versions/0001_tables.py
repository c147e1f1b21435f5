"""The tables of the platform."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "attempts",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("claim_id", sa.Uuid(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "ended_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column(
            "error", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True
        ),
        sa.PrimaryKeyConstraint("task_id", "attempt", name=op.f("attempts_pkey")),
    )
    op.create_table(
        "queues",
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.PrimaryKeyConstraint("agent", name=op.f("queues_pkey")),
    )
    op.create_table(
        "schedules",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column(
            "params",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("every_s", sa.Double(), nullable=False),
        sa.Column("each_host", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("last_tick_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("every_s >= 1", name=op.f("schedules_every_s_check")),
        sa.PrimaryKeyConstraint("name", name=op.f("schedules_pkey")),
    )
    op.create_table(
        "services",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column(
            "heartbeat_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("kind", "instance", name=op.f("services_pkey")),
    )
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="5", nullable=False),
        sa.Column(
            "params",
            postgresql.JSONB(none_as_null=True, astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column(
            "result", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True
        ),
        sa.Column(
            "error", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True
        ),
        sa.Column(
            "progress", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True
        ),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.Integer(), server_default="1", nullable=False),
        sa.Column("parent_id", sa.Uuid(), nullable=True),
        sa.Column("retry_of", sa.Uuid(), nullable=True),
        sa.Column("scheduled_by", sa.Text(), nullable=True),
        sa.Column(
            "labels",
            postgresql.JSONB(none_as_null=True, astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "run_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "wait_seconds",
            sa.Double(),
            sa.Computed(
                "CASE WHEN state <> 'queued' THEN greatest(0, extract(epoch from "
                "started_at - greatest(created_at, run_at))) END",
                persisted=True,
            ),
            nullable=True,
        ),
        sa.Column(
            "run_seconds",
            sa.Double(),
            sa.Computed("extract(epoch from finished_at - started_at)", persisted=True),
            nullable=True,
        ),
        sa.Column("time_limit_s", sa.Double(), server_default="60", nullable=False),
        sa.Column(
            "rerun_after_crash", sa.Boolean(), server_default=sa.text("true"), nullable=False
        ),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("crashes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("tick_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("call_index", sa.Integer(), nullable=True),
        sa.Column("child_id", sa.Uuid(), nullable=True),
        sa.Column("source", sa.Text(), server_default="api", nullable=False),
        sa.Column("claim_id", sa.Uuid(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rings", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_ring_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'waiting', 'succeeded', 'failed', 'cancelled')",
            name=op.f("tasks_state_check"),
        ),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("tasks_priority_check")),
        sa.PrimaryKeyConstraint("task_id", name=op.f("tasks_pkey")),
    )
    op.create_index("tasks_agent", "tasks", ["agent", "task_id"], unique=False)
    op.create_index(
        "tasks_call",
        "tasks",
        ["parent_id", "call_index"],
        unique=True,
        postgresql_where=sa.text("call_index IS NOT NULL"),
    )
    op.create_index(
        "tasks_deadline",
        "tasks",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND deadline_at IS NOT NULL"),
    )
    op.create_index(
        "tasks_finished",
        "tasks",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "tasks_finished_scheduled",
        "tasks",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL AND scheduled_by IS NOT NULL"),
    )
    op.create_index(
        "tasks_lease",
        "tasks",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "tasks_not_due",
        "tasks",
        ["run_at"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND next_ring_at IS NULL"),
    )
    op.create_index(
        "tasks_parent",
        "tasks",
        ["parent_id"],
        unique=False,
        postgresql_where=sa.text("parent_id IS NOT NULL"),
    )
    op.create_index(
        "tasks_rung",
        "tasks",
        ["agent", "next_ring_at"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND rings > 0"),
    )
    op.create_index(
        "tasks_tick",
        "tasks",
        ["scheduled_by", "tick_at", sa.literal_column("coalesce(host, '')")],
        unique=True,
        postgresql_where=sa.text("tick_at IS NOT NULL"),
    )
    op.create_index(
        "tasks_unrung",
        "tasks",
        ["agent", sa.literal_column("priority DESC"), "task_id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND rings = 0 AND next_ring_at IS NOT NULL"),
    )
    op.create_table(
        "workers",
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("pid_namespace", sa.Text(), nullable=False),
        sa.Column("process_started_at", sa.Double(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("running", sa.Integer(), server_default="0", nullable=False),
        sa.Column("claims", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("consuming", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "heartbeat_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stopped_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("workers_pkey")),
    )
    op.create_index("workers_agent", "workers", ["agent", "heartbeat_at"], unique=False)


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_table("tasks")
    op.drop_table("services")
    op.drop_table("schedules")
    op.drop_table("queues")
    op.drop_table("attempts")
