"""Schedules as data: sources, cron, overlap, catch-up, jitter, and what was missed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_CHECKS = {
    "timing": "(every_s IS NULL) <> (cron IS NULL)",
    "source": "source IN ('declaration', 'celeryconfig', 'user')",
    "overlap": "overlap IN ('skip', 'queue', 'replace')",
}


def upgrade() -> None:
    def add(name: str, kind: sa.types.TypeEngine, default: str | None) -> None:
        given = {"nullable": True} if default is None else {"server_default": sa.text(default)}
        op.add_column("schedules", sa.Column(name, kind, **{"nullable": False, **given}))

    add("source", sa.Text(), "'declaration'")
    add("priority", sa.SmallInteger(), "5")
    add("cron", sa.Text(), None)
    add("time_zone", sa.Text(), "'UTC'")
    add("overlap", sa.Text(), "'queue'")
    add("catch_up", sa.Integer(), "1")
    add("jitter_s", sa.Double(), "0")
    add("expires", sa.Boolean(), "true")
    add("next_tick_at", sa.DateTime(timezone=True), "now()")
    add("missed", sa.BigInteger(), "0")
    add("skipped", sa.BigInteger(), "0")
    op.alter_column("schedules", "every_s", nullable=True)
    # What was taken already must not be taken again.
    op.execute(
        "UPDATE schedules SET next_tick_at = to_timestamp("
        "(floor(extract(epoch FROM last_tick_at) / every_s) + 1) * every_s) "
        "WHERE last_tick_at IS NOT NULL"
    )
    for name, condition in _CHECKS.items():
        op.create_check_constraint(op.f(f"schedules_{name}_check"), "schedules", condition)
    op.create_index(
        "tasks_scheduled",
        "tasks",
        ["scheduled_by"],
        postgresql_where=sa.text("scheduled_by IS NOT NULL AND finished_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("tasks_scheduled", table_name="tasks")
    op.execute("DELETE FROM schedules WHERE source <> 'declaration'")
    for name in _CHECKS:
        op.drop_constraint(op.f(f"schedules_{name}_check"), "schedules")
    op.alter_column("schedules", "every_s", nullable=False)
    added = "source priority cron time_zone overlap catch_up jitter_s expires next_tick_at"
    for column in [*added.split(), "missed", "skipped"]:
        op.drop_column("schedules", column)
