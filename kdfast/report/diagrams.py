"""Figures of how runs went and what their predictions are worth. No torch."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, NullLocator, StrMethodFormatter

from kdfast.core.extras import extra
from kdfast.report.figures import COLUMN, MARKERS, family_styles, short

with extra("paper"):
    import seaborn as sns


def training_curves(curves: pd.DataFrame) -> Figure:
    """Validation loss and accuracy by epoch, a column a student: baseline (dashed) and taught by each teacher, means of seeds."""
    means = curves.groupby(["student", "teacher", "epoch"])[["valid_loss", "accuracy"]].mean().reset_index()
    students = sorted(means.student.unique(), key=lambda s: -means[(means.student == s)].teacher.nunique())
    students = [s for s in students if means[means.student == s].teacher.nunique() > 1] or students[:1]
    looks = _looks(means.teacher)
    size = (COLUMN, 3.8)
    figure, axes = plt.subplots(2, len(students), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for column, student in zip(axes.T, students, strict=True):
        for teacher, curve in means[means.student == student].groupby("teacher"):
            look = looks[teacher] | {"lw": 1.2, "marker": "", "label": short(teacher)}
            column[0].plot(curve.epoch, curve.valid_loss, **look)
            column[1].plot(curve.epoch, 100 * curve.accuracy, **look)
        column[0].set(title=f"student: {short(student)}", yscale="log")
        column[1].set(xlabel="epoch")
        _round_ticks(column[0].yaxis)
    axes[0, 0].set(ylabel="loss (nats)")
    axes[1, 0].set(ylabel="accuracy (%)")
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _looks(teachers: pd.Series) -> dict[str, dict]:
    """A colour and a marker for each teacher, black and dashed without one."""
    names = sorted(set(teachers) - {"baseline"})
    found = zip(names, sns.color_palette("colorblind", len(names)), cycle(MARKERS), strict=False)
    looks = {name: {"ls": "-", "color": colour, "marker": marker} for name, colour, marker in found}
    return looks | {"baseline": {"ls": "--", "color": "black", "marker": "."}}


def _round_ticks(axis: Axis, form: Formatter | None = None) -> None:
    """1, 2, 5, 10, … on a logarithmic axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(form or StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def reliability(bins: pd.DataFrame) -> Figure:
    """Accuracy against confidence, a panel a student: baseline (dashed) and taught by each teacher; on the diagonal, calibrated.

    `bins`: see `kdfast.report.selection.reliability_bins`; those of fewer than one in a hundred examples are left out.
    """
    students = sorted(bins.student.unique())
    looks = _looks(bins.teacher)
    figure, axes = plt.subplots(1, len(students), figsize=(COLUMN, 2.9), sharey=True, squeeze=False)
    for axis, student in zip(axes[0], students, strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        for teacher, rows in bins[(bins.student == student) & (bins.share >= 0.01)].groupby("teacher"):
            axis.plot(rows.confidence, rows.accuracy, markersize=3, linewidth=1, label=short(teacher), **looks[teacher])
        axis.set(title=f"student: {short(student)}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel("accuracy")
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines() if not line.get_label().startswith("_")}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    sns.despine(figure)
    return figure


def last_against_best(runs: pd.DataFrame) -> Figure:
    """Test accuracy of the epoch with the lowest validation loss against that of the last epoch, a point a run."""
    figure, axis = plt.subplots(figsize=(0.5 * COLUMN, 2.9))
    last, best = 100 * runs.test_top1, 100 * runs.best_test_top1
    low, high = min(last.min(), best.min()), max(last.max(), best.max())
    margin = 0.03 * (high - low) + 0.1
    axis.plot([low - margin, high + margin], [low - margin, high + margin], color="0.6", linewidth=0.8)
    kinds = np.where(runs.teacher.isna(), "baseline", "distilled")
    for kind, colour, marker in zip(("baseline", "distilled"), sns.color_palette("colorblind"), MARKERS, strict=False):
        look = {"color": [colour], "marker": marker, "alpha": 0.7, "linewidth": 0, "label": kind}
        axis.scatter(last[kinds == kind], best[kinds == kind], 14, **look)
    axis.set(xlabel="last epoch's test accuracy (%)", ylabel="best-validation epoch's (%)")
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def pareto(table: pd.DataFrame, students: list[str]) -> Figure:
    """Accuracy against latency, memory and size (`kdfast.report.costs.inference_table`), students filled; with Pareto front."""
    columns = {"latency_ms": "latency, batch 1 (ms)", "memory_mb": "memory, inference (MB)", "size_mb": "size on disk (MB)"}
    figure, axes = plt.subplots(1, 3, figsize=(COLUMN, 2.7), sharey=True)
    styles = family_styles(table.family)
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        known = table.dropna(subset=[column]).sort_values([column, "top1"], ascending=[True, False])
        front = known[known.top1 > known.top1.cummax().shift(fill_value=-np.inf)]
        axis.step(front[column], front.top1, where="post", color="0.6", linewidth=0.8, zorder=1)
        for row in known.itertuples():
            colour, marker = styles[row.family]
            face = colour if row.network in students else "white"
            axis.scatter(getattr(row, column), row.top1, 26, facecolor=[face], edgecolor=[colour], marker=marker, zorder=2)
            axis.annotate(short(row.network), (getattr(row, column), row.top1), (3, 3), textcoords="offset points", fontsize=6)
        axis.set(xlabel=label, xscale="log")
        axis.margins(x=0.25, y=0.08)  # room for names
        _round_ticks(axis.xaxis)
    axes[0].set_ylabel("test accuracy, baseline (%)")
    sns.despine(figure)
    return figure


def teacher_quality(distilled: pd.DataFrame) -> Figure:
    """Distilled students' accuracy against their teachers' accuracy and size, a line a student, markers by teacher's family."""
    means = distilled.groupby(["student", "teacher", "teacher_family"])[
        ["teacher_top1", "teacher_parameters", "test_top1"]
    ].mean()
    means = means.reset_index().sort_values("teacher_top1")
    styles = family_styles(means.teacher_family)
    figure, axes = plt.subplots(1, 2, figsize=(COLUMN, 2.8), sharey=True)
    looks = {"teacher_top1": ("teacher's test accuracy (%)", 100), "teacher_parameters": ("teacher's parameters", 1)}
    for axis, (column, (label, scale)) in zip(axes, looks.items(), strict=True):
        for dashes, (student, rows) in zip(cycle(("-", "--", ":", "-.")), means.groupby("student"), strict=False):
            line = rows.sort_values(column)
            axis.plot(scale * line[column], 100 * line.test_top1, dashes, color="0.5", linewidth=0.8, label=short(student))
        for row in means.itertuples():
            colour, marker = styles[row.teacher_family]
            axis.scatter(scale * getattr(row, column), 100 * row.test_top1, 22, color=[colour], marker=marker, zorder=2)
        axis.set(xlabel=label)
    axes[1].set_xscale("log")
    _round_ticks(axes[1].xaxis, EngFormatter(sep=""))
    axes[0].set_ylabel("distilled student (%)")
    lines = axes[0].get_legend_handles_labels()[0]
    families = [plt.Line2D([], [], color=c, marker=m, ls="", label=f"teacher: {name}") for name, (c, m) in styles.items()]
    figure.legend(handles=[*lines, *families], loc="outside lower center", ncols=4, frameon=False)
    sns.despine(figure)
    return figure
