"""The tables of this agent and every SQL statement on them: one function a verb.

Raw samples are kept for 48 h, 5-minute roll-ups for 30 days, hourly ones for a year. A roll-up
holds, for every number of a reading, `[count, mean, least, greatest, last]`. Time is PostgreSQL's
(`now()`), so a host whose clock is wrong neither loses its samples nor keeps them too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    Delete,
    Double,
    Index,
    Insert,
    Integer,
    Select,
    Table,
    Text,
    TextClause,
    Update,
    Uuid,
    bindparam,
    delete,
    extract,
    func,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert

from sutazai.models import metadata

FIVE_MINUTES_S = 300
HOUR_S = 3600

RAW_KEPT = timedelta(hours=48)
ROLLUPS_KEPT = {FIVE_MINUTES_S: timedelta(days=30), HOUR_S: timedelta(days=365)}
PLANS_KEPT = timedelta(days=30)
AUDIT_KEPT = timedelta(days=365)

LATE_S = 60
"""A bucket is rolled up this long after its end, when every sample of it has been committed."""

_BUCKETS_AT_ONCE = 12
_PRUNED_AT_ONCE = 5000

_Instant = DateTime(timezone=True)
_NOW = text("now()")

samples = Table(
    "hardware_samples",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("host", Text, nullable=False),
    Column("sampled_at", _Instant, nullable=False, server_default=_NOW),
    Column("metrics", JSONB, nullable=False),
    Index("hardware_samples_host", "host", "sampled_at"),
    Index("hardware_samples_sampled_at", "sampled_at"),
)

rollups = Table(
    "hardware_rollups",
    metadata,
    Column("host", Text, primary_key=True),
    Column("step_s", Integer, primary_key=True, autoincrement=False),
    Column("bucket_at", _Instant, primary_key=True),
    Column("samples", Integer, nullable=False),
    Column("metrics", JSONB, nullable=False),
    Index("hardware_rollups_bucket_at", "step_s", "bucket_at"),
)

plans = Table(
    "hardware_plans",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("created_at", _Instant, nullable=False, server_default=_NOW),
    Column("host", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("items", JSONB, nullable=False),
    Index("hardware_plans_created_at", "created_at"),
)

# A row is committed as `started`, with what undoing needs, before anything is changed, so a crash
# half-way leaves the way back.
audit = Table(
    "hardware_audit",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("task_id", Uuid, nullable=False),
    Column("host", Text, nullable=False),
    Column("plan_id", Uuid),
    Column("item_id", Text),
    Column("kind", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("outcome", Text, nullable=False, server_default="started"),
    Column("message", Text, nullable=False, server_default=""),
    Column("undo", JSONB, nullable=False),
    Column("gain", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("reverses", Uuid),
    Column("started_at", _Instant, nullable=False, server_default=_NOW),
    Column("finished_at", _Instant),
    CheckConstraint(
        "outcome IN ('started', 'applied', 'refused', 'failed', 'rolled_back', 'purged')",
        name="outcome",
    ),
    Index("hardware_audit_started_at", "started_at"),
)
Index(
    "hardware_audit_item",
    audit.c.plan_id,
    audit.c.item_id,
    unique=True,
    postgresql_where=audit.c.outcome.in_(("started", "applied")),
)
Index(
    "hardware_audit_quarantine",
    audit.c.host,
    postgresql_where=(audit.c.kind == "quarantine_file") & (audit.c.outcome == "applied"),
)


# --- samples --------------------------------------------------------------------------------


def insert_sample(
    sample_id: UUID, host: str, metrics: Mapping[str, Any], sampled_at: datetime | None = None
) -> Insert:
    """Store one reading, as taken now unless said otherwise."""
    values = {"id": sample_id, "host": host, "metrics": metrics}
    if sampled_at is not None:
        values["sampled_at"] = sampled_at
    return insert(samples).values(values)


def newest_sample(host: str) -> Select[Any]:
    """Return a host's newest reading and its age in seconds."""
    return (
        select(
            samples.c.metrics, extract("epoch", func.now() - samples.c.sampled_at).label("age_s")
        )
        .where(samples.c.host == host)
        .order_by(samples.c.sampled_at.desc())
        .limit(1)
    )


def known_hosts() -> Select[Any]:
    """Return every host that has a sample, by hops through the index rather than a scan."""
    first = select(func.min(samples.c.host).label("host")).cte("hosts", recursive=True)
    following = select(
        select(func.min(samples.c.host)).where(samples.c.host > first.c.host).scalar_subquery()
    ).where(first.c.host.is_not(None))
    hosts = first.union_all(following)
    return select(hosts.c.host).where(hosts.c.host.is_not(None))


def thinned_samples(host: str, window: timedelta, limit: int) -> TextClause:
    """Return a host's readings in the window, oldest first; at most `limit`, evenly spread."""
    return text(
        """
        SELECT DISTINCT ON (bin_at) date_bin(:step, sampled_at, 'epoch') AS bin_at,
               sampled_at, metrics
        FROM hardware_samples
        WHERE host = :host AND sampled_at >= now() - :window
        ORDER BY bin_at, sampled_at
        """
    ).bindparams(host=host, window=window, step=max(window / limit, timedelta(seconds=1)))


def clock() -> Select[Any]:
    """Return the time by PostgreSQL's clock."""
    return select(func.clock_timestamp())


# --- history --------------------------------------------------------------------------------


def raw_series(
    host: str,
    path: Sequence[str],
    *,
    since: datetime,
    until: datetime,
    step: timedelta,
) -> TextClause:
    """Return one number of the raw samples by bins: count, sum, least, greatest, last."""
    return text(
        """
        SELECT date_bin(:step, sampled_at, 'epoch') AS bin_at, count(value) AS count,
               sum(value) AS sum, min(value) AS least, max(value) AS greatest,
               (array_agg(value ORDER BY sampled_at DESC))[1] AS last
        FROM (SELECT sampled_at, (metrics #>> :path)::float8 AS value FROM hardware_samples
              WHERE host = :host AND sampled_at >= :since AND sampled_at < :until) AS sample
        WHERE value IS NOT NULL GROUP BY 1 ORDER BY 1
        """
    ).bindparams(
        bindparam("path", list(path), ARRAY(Text)), host=host, since=since, until=until, step=step
    )


def rolled_series(
    host: str, key: str, *, rollup_s: int, since: datetime, until: datetime, step: timedelta
) -> TextClause:
    """Return one number of the roll-ups by bins: count, sum, least, greatest, last."""
    return text(
        """
        SELECT date_bin(:step, bucket_at, 'epoch') AS bin_at, sum(n)::int AS count,
               sum(n * mean) AS sum, min(least) AS least, max(greatest) AS greatest,
               (array_agg(last ORDER BY bucket_at DESC))[1] AS last
        FROM (SELECT bucket_at, (value->>0)::float8 AS n, (value->>1)::float8 AS mean,
                     (value->>2)::float8 AS least, (value->>3)::float8 AS greatest,
                     (value->>4)::float8 AS last
              FROM (SELECT bucket_at, metrics->:key AS value FROM hardware_rollups
                    WHERE host = :host AND step_s = :rollup_s
                      AND bucket_at >= :since AND bucket_at < :until) AS bucket
              WHERE value IS NOT NULL) AS number
        GROUP BY 1 ORDER BY 1
        """
    ).bindparams(
        bindparam("key", key, Text),
        host=host,
        rollup_s=rollup_s,
        since=since,
        until=until,
        step=step,
    )


def rolled_until(host: str, rollup_s: int) -> Select[Any]:
    """Return the start of a host's newest roll-up."""
    return select(func.max(rollups.c.bucket_at)).where(
        rollups.c.host == host, rollups.c.step_s == rollup_s
    )


# --- upkeep ---------------------------------------------------------------------------------


def roll_up(host: str, numbers: Iterable[tuple[str, Sequence[str]]]) -> TextClause:
    """Sum up the next complete 5 minutes of a host; what is there already stays as it is.

    `numbers` are (key, path) pairs; in a path `{device}` stands for every disk or GPU. After a
    long pause it catches up by a few buckets at a time.
    """
    pairs = list(numbers)
    plain = [(key, path) for key, path in pairs if "{device}" not in path]
    disks = [path[-1] for _, path in pairs if path[0] == "disk_usage"]
    gpus = [path[-1] for _, path in pairs if path[0] == "gpus"]
    # `|| '{}'` unpacks a stored reading once, rather than for each number that is taken from it.
    return text(
        """
        INSERT INTO hardware_rollups (host, step_s, bucket_at, samples, metrics)
        WITH first AS (
            SELECT date_bin(:step, min(sampled_at), 'epoch') AS from_at FROM hardware_samples
            WHERE host = :host AND sampled_at >= coalesce(
                (SELECT max(bucket_at) + :step FROM hardware_rollups
                 WHERE host = :host AND step_s = :rollup_s), '-infinity')
        ), sample AS MATERIALIZED (
            SELECT sampled_at, date_bin(:step, sampled_at, 'epoch') AS bucket_at,
                   metrics || '{}' AS metrics
            FROM hardware_samples, first
            WHERE host = :host AND sampled_at >= from_at
              AND sampled_at < least(from_at + :span, date_bin(:step, now() - :late, 'epoch'))
        ), number AS (
            SELECT sampled_at, bucket_at, key, (metrics #>> path::text[])::float8 AS value
            FROM sample, unnest(:keys, :paths) AS plain(key, path)
            UNION ALL
            SELECT sampled_at, bucket_at, 'disk_usage.' || field || ':' || device,
                   (usage->>field)::float8
            FROM sample, jsonb_each(metrics->'disk_usage') AS disk(device, usage),
                 unnest(:disks) AS field
            UNION ALL
            SELECT sampled_at, bucket_at, 'gpus.' || field || ':' || (gpu->>'index'),
                   (gpu->>field)::float8
            FROM sample, jsonb_array_elements(metrics->'gpus') AS gpu, unnest(:gpus) AS field
        ), summary AS (
            SELECT bucket_at, key, jsonb_build_array(
                       count(value), avg(value), min(value), max(value),
                       (array_agg(value ORDER BY sampled_at DESC))[1]) AS value
            FROM number WHERE value IS NOT NULL GROUP BY bucket_at, key
        )
        SELECT :host, :rollup_s, bucket_at,
               (SELECT count(*) FROM sample WHERE sample.bucket_at = summary.bucket_at),
               jsonb_object_agg(key, value)
        FROM summary GROUP BY bucket_at
        ON CONFLICT (host, step_s, bucket_at) DO NOTHING
        """
    ).bindparams(
        bindparam("keys", [key for key, _ in plain], ARRAY(Text)),
        bindparam("paths", [f"{{{','.join(path)}}}" for _, path in plain], ARRAY(Text)),
        bindparam("disks", disks, ARRAY(Text)),
        bindparam("gpus", gpus, ARRAY(Text)),
        bindparam("host", host, Text),
        bindparam("rollup_s", FIVE_MINUTES_S, Integer),
        step=timedelta(seconds=FIVE_MINUTES_S),
        span=timedelta(seconds=FIVE_MINUTES_S * _BUCKETS_AT_ONCE),
        late=timedelta(seconds=LATE_S),
    )


def roll_up_hours(host: str) -> TextClause:
    """Join a host's 5-minute roll-ups of each complete hour; exact, as counts weigh the means."""
    return text(
        """
        INSERT INTO hardware_rollups (host, step_s, bucket_at, samples, metrics)
        WITH bucket AS (
            SELECT date_bin(:step, bucket_at, 'epoch') AS hour_at, bucket_at, samples, metrics
            FROM hardware_rollups
            WHERE host = :host AND step_s = :fine_s
              AND bucket_at >= coalesce(
                  (SELECT max(bucket_at) + :step FROM hardware_rollups
                   WHERE host = :host AND step_s = :rollup_s), '-infinity')
              AND bucket_at < date_bin(:step, (SELECT max(bucket_at) + :fine FROM hardware_rollups
                                               WHERE host = :host AND step_s = :fine_s), 'epoch')
        ), summary AS (
            SELECT hour_at, key, jsonb_build_array(
                       sum((value->>0)::int),
                       sum((value->>0)::int * (value->>1)::float8) / sum((value->>0)::int),
                       min((value->>2)::float8), max((value->>3)::float8),
                       (array_agg((value->>4)::float8 ORDER BY bucket_at DESC))[1]) AS value
            FROM bucket, jsonb_each(metrics) AS number(key, value) GROUP BY hour_at, key
        )
        SELECT :host, :rollup_s, hour_at,
               (SELECT sum(samples) FROM bucket WHERE bucket.hour_at = summary.hour_at),
               jsonb_object_agg(key, value)
        FROM summary GROUP BY hour_at
        ON CONFLICT (host, step_s, bucket_at) DO NOTHING
        """
    ).bindparams(
        bindparam("host", host, Text),
        bindparam("rollup_s", HOUR_S, Integer),
        bindparam("fine_s", FIVE_MINUTES_S, Integer),
        step=timedelta(seconds=HOUR_S),
        fine=timedelta(seconds=FIVE_MINUTES_S),
    )


def prune_samples() -> Delete:
    """Delete raw samples past their time, of every host; rows that others delete are skipped."""
    old = (
        select(samples.c.id)
        .where(samples.c.sampled_at < func.now() - RAW_KEPT)
        .order_by(samples.c.sampled_at)
        .limit(_PRUNED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return delete(samples).where(samples.c.id.in_(old))


def prune_rollups(rollup_s: int) -> Delete:
    """Delete roll-ups past their time, of every host."""
    row = (rollups.c.host, rollups.c.step_s, rollups.c.bucket_at)
    old = (
        select(*row)
        .where(
            rollups.c.step_s == rollup_s,
            rollups.c.bucket_at < func.now() - ROLLUPS_KEPT[rollup_s],
        )
        .limit(_PRUNED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return delete(rollups).where(func.row(*row).in_(old))


def prune_plans() -> Delete:
    """Delete plans past their time."""
    old = (
        select(plans.c.id)
        .where(plans.c.created_at < func.now() - PLANS_KEPT)
        .limit(_PRUNED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return delete(plans).where(plans.c.id.in_(old))


def prune_audit() -> Delete:
    """Delete audit rows past their time, unless a file of theirs still lies in quarantine."""
    old = (
        select(audit.c.id)
        .where(
            audit.c.started_at < func.now() - AUDIT_KEPT,
            or_(audit.c.kind != "quarantine_file", audit.c.outcome != "applied"),
        )
        .limit(_PRUNED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return delete(audit).where(audit.c.id.in_(old))


# --- plans and audit ------------------------------------------------------------------------


def insert_plan(
    plan_id: UUID, host: str, resource: str, items: Sequence[Mapping[str, Any]]
) -> Insert:
    """Store a plan."""
    return insert(plans).values(id=plan_id, host=host, resource=resource, items=list(items))


def find_plan(plan_id: UUID) -> Select[Any]:
    """Return a plan."""
    return select(plans).where(plans.c.id == plan_id)


def begin(row: Mapping[str, Any]) -> Insert:
    """Record that an item is about to be carried out.

    Returns nothing when it is carried out already or has been.
    """
    return insert(audit).values(row).on_conflict_do_nothing().returning(audit.c.id)


def find_begun(plan_id: UUID, item_id: str) -> Select[Any]:
    """Return the audit row of an item that is being or has been carried out."""
    return select(audit).where(
        audit.c.plan_id == plan_id,
        audit.c.item_id == item_id,
        audit.c.outcome.in_(("started", "applied")),
    )


def insert_audit(row: Mapping[str, Any]) -> Insert:
    """Record something that has already been decided, as a refusal or a rollback."""
    return insert(audit).values({**row, "finished_at": func.now()})


def end(
    audit_id: UUID, outcome: str, *, gain: Mapping[str, Any] | None = None, message: str = ""
) -> Update:
    """Record how an item ended."""
    values: dict[str, Any] = {"outcome": outcome, "message": message, "finished_at": func.now()}
    if gain is not None:
        values["gain"] = gain
    return update(audit).where(audit.c.id == audit_id).values(values)


def find_audit(audit_id: UUID) -> Select[Any]:
    """Return an audit row."""
    return select(audit).where(audit.c.id == audit_id)


def quarantined(host: str, audit_ids: Sequence[UUID] | None) -> Select[Any]:
    """Return the audit rows of a host's quarantined files: these, or those whose time has come."""
    query = select(audit).where(
        audit.c.host == host, audit.c.kind == "quarantine_file", audit.c.outcome == "applied"
    )
    if audit_ids is not None:
        return query.where(audit.c.id.in_(audit_ids))
    due = audit.c.undo["purge_after_unix_s"].as_float() <= extract("epoch", func.now()).cast(Double)
    return query.where(due).order_by(audit.c.started_at).limit(_PRUNED_AT_ONCE)
