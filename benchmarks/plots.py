"""Draws charts as PNG files beside the report."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measurement import Chart


def draw(chart: Chart, folder: Path) -> Path:
    """Write one chart; needs matplotlib, which `make bench` installs."""
    import matplotlib as library  # noqa: PLC0415 - only those who plot need it

    library.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415 - after the choice above

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for curve in chart.curves:
        axes.plot(curve.x, curve.y, marker="o", label=curve.label)
    if chart.log_x:
        axes.set_xscale("symlog" if _has_zero(chart) else "log")
    if chart.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path = folder / f"{chart.name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _has_zero(chart: Chart) -> bool:
    return any(x == 0 for curve in chart.curves for x in curve.x)
