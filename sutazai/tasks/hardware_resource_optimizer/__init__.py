"""Measures every host, foresees what runs short, and frees memory, CPU time and disk space.

Each host is sampled every 30 s. Pressure stall information says whether a shortage hurts,
utilisation is context; inside a container its own limits count. Everything that changes the
machine is a dry run unless asked otherwise, leaves an audit row, and reports the gain it measured.
"""

from __future__ import annotations

from datetime import timedelta

from sutazai.agent import Agent, Context, NoParams
from sutazai.tasks.hardware_resource_optimizer import (
    advice,
    anomaly,
    duplicate,
    history,
    plan,
    prediction,
    remedy,
    sampling,
    storage,
)

agent = Agent(
    "hardware-resource-optimizer",
    port=8002,
    doc=__doc__,
    slots=(1, 2, 4),
    default_action="get_metrics",
)

_SCAN_LIMIT_S = storage.LONGEST_BUDGET_S + 30.0
_CHANGE_LIMIT_S = remedy.LONGEST_S + 120.0

agent.health_check("samples")(sampling.check_health)


@agent.action(time_limit_s=20)
def get_metrics(params: sampling.GetMetricsParams, context: Context) -> sampling.MetricsResult:
    """Return what a host's CPU, memory, disks, network, GPUs and busiest processes are doing.

    Served from the newest sample when that is young enough, else measured anew.
    """
    return sampling.get(params, context)


@agent.action(time_limit_s=25, every=sampling.PERIOD, on="each-host")
def sample(params: NoParams, context: Context) -> sampling.SampleResult:  # noqa: ARG001
    """Measure this host and store the sample; keeps the roll-ups and the retention as well."""
    return sampling.record(context)


@agent.action(time_limit_s=30)
def get_history(params: history.HistoryParams, context: Context) -> history.Series:
    """Return one number of the samples over time, in steps."""
    return history.get(params, context)


@agent.action(time_limit_s=_CHANGE_LIMIT_S)
def optimize_memory(params: plan.OptimizeParams, context: Context) -> plan.Optimization:
    """Plan how to free memory: page cache of the group, idle models and slots, large processes.

    A dry run unless `dry_run` is false; then what is reversible is carried out. Processes are
    stopped only by `apply`.
    """
    return plan.optimize(("memory",), params, context)


@agent.action(time_limit_s=_CHANGE_LIMIT_S)
def optimize_cpu(params: plan.OptimizeParams, context: Context) -> plan.Optimization:
    """Plan how to relieve the cores: niceness and cores of busy processes, fewer slots.

    A dry run unless `dry_run` is false; then what is reversible is carried out.
    """
    return plan.optimize(("cpu",), params, context)


@agent.action(time_limit_s=_CHANGE_LIMIT_S)
def optimize_disk(params: plan.OptimizeParams, context: Context) -> plan.Optimization:
    """Plan how to free disk space in `paths`: equal files share an inode, old ones are quarantined.

    A dry run unless `dry_run` is false; then what is reversible is carried out. Quarantined files
    can be restored by `rollback` and free their space when they are purged.
    """
    return plan.optimize(("disk",), params, context)


@agent.action(time_limit_s=_CHANGE_LIMIT_S)
def optimize_all(params: plan.OptimizeParams, context: Context) -> plan.Optimization:
    """Plan for memory, CPU time and disk space together, as the three actions for each do."""
    return plan.optimize(("memory", "cpu", "disk"), params, context)


@agent.action(time_limit_s=_SCAN_LIMIT_S)
def analyze_storage(params: storage.ScanParams, context: Context) -> storage.StorageReport:
    """Tell what fills a folder: by folder, by file, by extension and by age."""
    return storage.analyze(params, context)


@agent.action(time_limit_s=_SCAN_LIMIT_S)
def find_duplicates(params: storage.ScanParams, context: Context) -> duplicate.Duplicates:
    """Find files of equal content below a folder, the most wasteful first."""
    return duplicate.find(params, context)


@agent.action(time_limit_s=_SCAN_LIMIT_S)
def find_large_files(params: storage.ScanParams, context: Context) -> storage.LargeFiles:
    """Find the largest files below a folder."""
    return storage.find_large(params, context)


@agent.action(time_limit_s=30)
def forecast(params: prediction.ForecastParams, context: Context) -> prediction.Forecast:
    """Foresee when a disk, memory or swap runs full at the present trend, with 95 % bounds."""
    return prediction.predict(params, context)


@agent.action(time_limit_s=30)
def detect_anomalies(params: anomaly.AnomalyParams, context: Context) -> anomaly.Anomalies:
    """Name what is unusual now: numbers far from their past, and processes that have grown."""
    return anomaly.detect(params, context)


@agent.action(time_limit_s=60)
def recommend(params: advice.RecommendParams, context: Context) -> advice.Recommendations:
    """Advise on memory, CPU time and disks from the samples, with the evidence for each advice."""
    return advice.recommend(params, context)


@agent.action(time_limit_s=_CHANGE_LIMIT_S)
def apply(params: remedy.ApplyParams, context: Context) -> remedy.ApplyResult:
    """Carry out items of a stored plan, also those that cannot be undone; leaves audit rows."""
    return remedy.apply(params, context)


@agent.action(time_limit_s=180)
def rollback(params: remedy.RollbackParams, context: Context) -> remedy.RollbackResult:
    """Undo what an audit row records, if that is still possible; leaves an audit row."""
    return remedy.rollback(params, context)


@agent.action(time_limit_s=_CHANGE_LIMIT_S)
def tune_pools(params: plan.TuneParams, context: Context) -> plan.Optimization:
    """Shrink worker pools on hosts under pressure; grow them where work waits and there is room.

    A dry run unless `dry_run` is false. Pools stay within their agents' bounds.
    """
    return plan.tune_pools(params, context)


@agent.action(time_limit_s=300, every=timedelta(hours=1), on="each-host")
def purge_quarantine(params: remedy.PurgeParams, context: Context) -> remedy.PurgeResult:
    """Delete quarantined files for good whose retention has ended, or those that are named."""
    return remedy.purge(params, context)
