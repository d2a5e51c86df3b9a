"""What the measurements say: tables, geometric means by batch size, JSON and a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

GROUPS = {"M <= 64": (1, 64), "64 < M < 512": (65, 511), "M >= 512": (512, 1 << 62)}
"""Batch sizes (first and last) by what bounds the time: reading the weight, neither alone, arithmetic."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds per call of every column, for one [m, k] x [k, n] product; `label` names the projections of this shape."""

    label: str
    m: int
    n: int
    k: int
    microseconds: dict[str, float]

    def ratio(self, column: str, baseline: str) -> float:
        """How many times faster than `baseline` the column is."""
        return self.microseconds[baseline] / self.microseconds[column]


@dataclass(frozen=True)
class Summary:
    """One column's ratios to the baseline over the shapes of one group."""

    column: str
    group: str
    shapes: int
    geometric_mean: float
    worst: float
    worst_shape: str


def summarise(measurements: Sequence[Measurement], baseline: str) -> list[Summary]:
    """Geometric mean and worst ratio of every column but the baseline, in every group that has shapes."""
    columns = dict.fromkeys(c for m in measurements for c in m.microseconds if c != baseline)
    summaries = []
    for column in columns:
        for group, (first, last) in GROUPS.items():
            inside = [(m.ratio(column, baseline), m) for m in measurements if first <= m.m <= last]
            if not inside:
                continue
            worst, shape = min(inside, key=lambda pair: pair[0])
            mean = exp(fmean(log(ratio) for ratio, _ in inside))
            summaries.append(
                Summary(column, group, len(inside), mean, worst, f"{shape.label} M={shape.m} N={shape.n} K={shape.k}")
            )
    return summaries


def measurement_table(title: str, measurements: Sequence[Measurement], baseline: str) -> Table:
    """Microseconds of every column and the ratio of each to the baseline."""
    columns = [c for c in measurements[0].microseconds if c != baseline]
    table = Table(title=title, title_justify="left")
    for name in ("projection", "M", "N", "K", f"{baseline} us"):
        table.add_column(name, justify="left" if name == "projection" else "right")
    for column in columns:
        table.add_column(f"{column} us", justify="right")
        table.add_column("ratio", justify="right")
    for m in measurements:
        cells = [m.label, str(m.m), str(m.n), str(m.k), f"{m.microseconds[baseline]:.1f}"]
        for column in columns:
            cells += [f"{m.microseconds[column]:.1f}", f"{m.ratio(column, baseline):.2f}"]
        table.add_row(*cells)
    return table


def summary_table(summaries: Sequence[Summary], baseline: str) -> Table:
    """The summaries as a table."""
    table = Table(title=f"ratio to {baseline} (above 1 is faster)", title_justify="left")
    for name, justify in (
        ("column", "left"),
        ("batch", "left"),
        ("shapes", "right"),
        ("geometric mean", "right"),
        ("worst", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("worst shape")
    for s in summaries:
        table.add_row(s.column, s.group, str(s.shapes), f"{s.geometric_mean:.3f}", f"{s.worst:.3f}", s.worst_shape)
    return table


def write_json(
    path: Path, environment: Mapping[str, str], measurements: Sequence[Measurement], extra: Mapping[str, Any]
) -> None:
    """Everything that was measured, and on what."""
    data = {"environment": dict(environment), "measurements": [asdict(m) for m in measurements], **extra}
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_plot(path: Path, title: str, measurements: Sequence[Measurement], baseline: str) -> None:
    """Ratio to the baseline against M: a dot for each shape, a line through the geometric means."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = [c for c in measurements[0].microseconds if c != baseline]
    rows = sorted({m.m for m in measurements})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.axhline(1, color="black", linewidth=1)
    for i, column in enumerate(columns):
        means = [exp(fmean(log(m.ratio(column, baseline)) for m in measurements if m.m == row)) for row in rows]
        color = f"C{i}"
        axes.plot(rows, means, color=color, label=column)
        shift = 2 ** (0.12 * (i - (len(columns) - 1) / 2))  # side by side, so that no column hides another
        axes.scatter(
            [m.m * shift for m in measurements], [m.ratio(column, baseline) for m in measurements], color=color, s=10, alpha=0.6
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(row) for row in rows])
    axes.minorticks_off()
    axes.set_xlabel("M (rows in the batch)")
    axes.set_ylabel(f"speed relative to {baseline}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
