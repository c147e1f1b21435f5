"""The tables of hardware-resource-optimizer: samples, roll-ups, plans, audit."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hardware_samples",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column(
            "sampled_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("hardware_samples_pkey")),
    )
    op.create_index("hardware_samples_host", "hardware_samples", ["host", "sampled_at"])
    op.create_index("hardware_samples_sampled_at", "hardware_samples", ["sampled_at"])
    op.create_table(
        "hardware_rollups",
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("step_s", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("bucket_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("host", "step_s", "bucket_at", name=op.f("hardware_rollups_pkey")),
    )
    op.create_index("hardware_rollups_bucket_at", "hardware_rollups", ["step_s", "bucket_at"])
    op.create_table(
        "hardware_plans",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("items", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("hardware_plans_pkey")),
    )
    op.create_index("hardware_plans_created_at", "hardware_plans", ["created_at"])
    op.create_table(
        "hardware_audit",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("plan_id", sa.Uuid(), nullable=True),
        sa.Column("item_id", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), server_default="started", nullable=False),
        sa.Column("message", sa.Text(), server_default="", nullable=False),
        sa.Column("undo", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "gain",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("reverses", sa.Uuid(), nullable=True),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('started', 'applied', 'refused', 'failed', 'rolled_back', 'purged')",
            name=op.f("hardware_audit_outcome_check"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("hardware_audit_pkey")),
    )
    op.create_index("hardware_audit_started_at", "hardware_audit", ["started_at"])
    op.create_index(
        "hardware_audit_item",
        "hardware_audit",
        ["plan_id", "item_id"],
        unique=True,
        postgresql_where=sa.text("outcome IN ('started', 'applied')"),
    )
    op.create_index(
        "hardware_audit_quarantine",
        "hardware_audit",
        ["host"],
        postgresql_where=sa.text("kind = 'quarantine_file' AND outcome = 'applied'"),
    )


def downgrade() -> None:
    op.drop_table("hardware_audit")
    op.drop_table("hardware_plans")
    op.drop_table("hardware_rollups")
    op.drop_table("hardware_samples")
