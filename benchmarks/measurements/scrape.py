"""How long Prometheus waits for the metrics."""

from __future__ import annotations

from benchmarks.load import fire, request
from benchmarks.measurement import Finding, Run, Samples, Target, at_most, measurement
from benchmarks.place import running

EXPORTER = "ai-metrics-exporter"

MEDIAN = Target("scrape: `GET :11063/metrics`, p50", first=at_most(100), then=at_most(30))


@measurement("scrape", MEDIAN)
def scrape(run: Run) -> Finding:
    """Scrape the exporter of the whole system, again and again on one connection.

    All agents run, and some thousand tasks have ended.
    """
    p50: list[float] = []
    p99: list[float] = []
    home = run.folder / "scrape" / ".sutazai"
    home.parent.mkdir()
    with running(home, "--no-flower") as site:
        site.drain(run.size(5000, 500))
        wanted = request("GET", f"{site.url_of(EXPORTER)}/metrics")
        fire(wanted, 1, total=5).require("200")
        for _ in range(run.rounds):
            found = fire(wanted, 1, total=run.size(100, 20)).require("200")
            p50.append(found.percentile_ms(50))
            p99.append(found.percentile_ms(99))
            run.say(f"p50 {p50[-1]:.1f} ms")
    return Finding(rows=[MEDIAN.row(Samples(p50, "ms"))], notes=[f"p99: {Samples(p99, 'ms')}."])
