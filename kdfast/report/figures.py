"""Figures: seaborn and matplotlib only, no torch. Colour-blind safe, and readable in grey by marker and label."""

import zlib
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdfast.core.extras import extra

with extra("paper"):
    import seaborn as sns

COLUMN = 6.3  # inches: the width of the paper's text
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAMILIES = (
    "mobile", "resnet", "vit", "plain", "densenet", "regnet", "mobilenetv3", "swin_transformer", "vision_transformer", "vgg",
    "wide_resnet", "mobilenetv2", "shufflenet", "shufflenetv2", "convnext", "efficientnet",
)  # fmt: skip  # their place decides colour and marker
LATIN_MODERN = Path("/usr/share/texmf/fonts/opentype/public/lm")  # Debian's package lmodern, the paper's font


def use_paper_style() -> None:
    """The paper's font and sizes, so that a figure needs no scaling there."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    for face in ("lmroman10-regular.otf", "lmroman10-bold.otf", "lmroman10-italic.otf"):
        if (LATIN_MODERN / face).is_file():
            font_manager.fontManager.addfont(LATIN_MODERN / face)
    plt.rcParams |= {
        "font.family": "serif",
        "font.serif": ["Latin Modern Roman", "cmr10", "DejaVu Serif"],
        "mathtext.fontset": "cm",
        "font.size": 9,
        "axes.labelsize": 9,
        "axes.titlesize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "figure.constrained_layout.use": True,
    }


def short(model: str) -> str:
    """A model's name as it is written in figures: without the prefix that all small networks share."""
    return model.removeprefix("mini_").replace("_", " ")


def learning_curves(history: dict[str, list[float | None]]) -> Figure:
    """Losses and accuracy by epoch, of a record's or a Learner's history."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    epochs = range(1, len(history["valid_loss"]) + 1)
    for name in ("train_loss", "train_ce", "valid_loss"):
        if name in history:
            left.plot(epochs, history[name], label=name.replace("_", " "))
    left.set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    left.legend(frameon=False)
    right.plot(epochs, history["accuracy"])
    right.set(xlabel="epoch", ylabel="validation accuracy")
    return figure


def family_styles(families: pd.Series) -> dict[str, tuple[tuple, str]]:
    """A colour and a marker for each family, the same in every figure of every study."""
    return {name: _style(name) for name in sorted(families.dropna().unique())}


def _style(family: str) -> tuple[tuple, str]:
    place = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES) + zlib.crc32(family.encode()) % 80
    palette = sns.color_palette("colorblind")
    return palette[place % len(palette)], MARKERS[place % len(MARKERS)]


def teacher_against_student(distilled: pd.DataFrame, baselines: pd.DataFrame) -> Figure:
    """Teacher's accuracy against distilled student's, a panel a student.

    `distilled`: rows of `kdfast.stats.paired.gains`; `baselines`: the undistilled runs. Points are means over seeds, bars their
    standard deviation, areas the teacher's parameters; the dashed line is the student without a teacher, the dotted
    one equality with the teacher.
    """
    students = sorted(distilled.student.unique())
    figure, axes = plt.subplots(1, len(students), figsize=(COLUMN, 3.0), squeeze=False)
    styles, labels = family_styles(baselines.family), {}
    for axis, student in zip(axes[0], students, strict=True):
        _reference(axis, 100 * baselines[baselines.student == student].test_top1)
        labels[axis] = _teachers(axis, distilled[distilled.student == student], styles)
        axis.set(title=f"student: {short(student)}", xlabel="teacher's test accuracy (%)", ylabel="")
    axes[0][0].set_ylabel("distilled student's test accuracy (%)")
    shown = distilled.teacher_family.unique()
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=family)
        for family, (colour, marker) in styles.items()
        if family in shown
    ]
    handles.append(plt.Line2D([], [], color="0.35", linestyle="--", label="baseline (± s.d.)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    sns.despine(figure)
    figure.draw_without_rendering()  # the layout is final: labels can be placed by their size on paper
    for axis, names in labels.items():
        _label(axis, names)
    return figure


def _reference(axis: Axes, baseline: pd.Series) -> None:
    axis.axhline(baseline.mean(), color="0.35", linestyle="--", linewidth=1, zorder=1)
    if len(baseline) > 1:
        axis.axhspan(baseline.mean() - baseline.std(), baseline.mean() + baseline.std(), color="0.9", zorder=0)


def _teachers(axis: Axes, runs: pd.DataFrame, styles: dict) -> dict[str, tuple[float, float]]:
    """Draw the points and return where each teacher's is."""
    largest = runs.teacher_parameters.max()
    cells = runs.groupby(["teacher", "teacher_family", "teacher_parameters"])
    table = 100 * cells[["teacher_top1", "test_top1"]].agg(["mean", "std"]).fillna(0)
    labels = {}
    for (teacher, family, parameters), row in table.iterrows():
        (x, x_sd), (y, y_sd) = row["teacher_top1"], row["test_top1"]
        colour, marker = styles[family]
        axis.errorbar(x, y, xerr=x_sd, yerr=y_sd, color=colour, elinewidth=0.7, capsize=0, zorder=2)
        area = 20 + 130 * parameters / largest
        axis.scatter(x, y, area, color=[colour], marker=marker, edgecolor="white", linewidth=0.6, zorder=3)
        labels[short(teacher)] = x, y
    return labels


def _label(axis: Axes, points: dict[str, tuple[float, float]], width: float = 50, height: float = 8) -> None:
    """Write names right of their points, each moved up (in typographic points) until it overlaps none below it."""
    scale = 72 / axis.figure.dpi
    taken: list[tuple[float, float]] = []
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = axis.transData.transform(point) * scale
        lift = 3.0
        while any(abs(x - other_x) < width and abs(y + lift - other_y) < height for other_x, other_y in taken):
            lift += 0.5
        taken.append((x, y + lift))
        line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5} if lift > 6 else None
        axis.annotate(name, point, (6, lift), textcoords="offset points", fontsize=7, arrowprops=line, zorder=4)


def gain_matrix(distilled: pd.DataFrame, decided: pd.DataFrame) -> Figure:
    """Teacher × student: mean gain in points; `decided` (same index and columns) is true where the interval leaves 0 out."""
    order = distilled.groupby("teacher").teacher_top1.mean().sort_values(ascending=False).index
    table = distilled.pivot_table(index="teacher", columns="student", values="gain").loc[order]
    marks = decided.loc[table.index, table.columns].to_numpy()
    text = np.where(marks, table.map("{:+.2f}".format), table.map("({:+.2f})".format))
    figure, axis = plt.subplots(figsize=(0.62 * COLUMN, max(1.8, 0.9 + 0.26 * len(table))))
    limit = max(float(np.nanmax(np.abs(table.to_numpy()))), 0.1)
    sns.heatmap(table, annot=text, fmt="", cmap="PuOr", vmin=-limit, vmax=limit, linewidths=0.5, ax=axis,
                cbar_kws={"label": "gain (points)"})  # fmt: skip
    axis.set(xlabel="student", ylabel="teacher, best first")
    axis.set_xticklabels([short(label.get_text()) for label in axis.get_xticklabels()], rotation=0)
    axis.set_yticklabels([short(label.get_text()) for label in axis.get_yticklabels()], rotation=0)
    return figure


def forest(gains: pd.DataFrame) -> Figure:
    """Gain and interval of every method (`kdfast.report.claims.method_gains`), a marker a pair, best method on top."""
    methods = list(dict.fromkeys(gains.method))
    pairs = list(gains[["pair", "teacher", "student"]].drop_duplicates().itertuples(index=False))
    figure, axis = plt.subplots(figsize=(COLUMN, 0.8 + 0.24 * len(methods)))
    axis.axvline(0, color="0.35", linestyle="--", linewidth=1)
    for i, (pair, colour, marker) in enumerate(zip(pairs, cycle(sns.color_palette("colorblind")), cycle(MARKERS), strict=False)):
        rows = gains[(gains.teacher == pair.teacher) & (gains.student == pair.student)]
        y = [methods.index(m) + 0.16 * (2 * i - len(pairs) + 1) for m in rows.method]
        error = [rows["mean"] - rows.low, rows.high - rows["mean"]]
        label = f"{short(pair.teacher)} to {short(pair.student)} ({pair.pair}-architecture)"
        axis.errorbar(rows["mean"], y, xerr=error, fmt=marker, color=colour, markersize=4, elinewidth=0.8, label=label)
    axis.set_yticks(range(len(methods)), [method.replace("_", " ") for method in methods])
    axis.invert_yaxis()
    axis.set_xlabel("gain over the baseline (percentage points, 95 % interval)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    sns.despine(figure)
    return figure


def growth(amortise: dict) -> Figure:
    """Cost of n distilled runs over that of n runs without a teacher, measured (points) and modelled (lines).

    `amortise`: the results of benchmarks/amortise.py. Model: every run costs what a distilled one costs without its teacher,
    which is paid in every run (live) or once (stored).
    """
    rows, s = pd.DataFrame(amortise["rows"]), amortise["settings"]
    n = np.geomspace(1, rows.runs.max(), 200)
    models = {"live": np.full_like(n, s["live_teacher_s"]), "cached": s["cached_teacher_s"] / n}
    figure, axis = plt.subplots(figsize=(0.62 * COLUMN, 2.4))
    axis.axhline(1, color="0.35", linestyle="--", linewidth=1)
    for (kind, taught), colour, marker in zip(models.items(), sns.color_palette("colorblind"), MARKERS, strict=False):
        axis.plot(n, (s["distilled_s"] + taught) / s["baseline_s"], color=colour, linewidth=1)
        y = rows[f"{kind} (s)"] / rows["baseline (s)"]
        axis.plot(rows.runs, y, marker, color=colour, markersize=5)
        words = {"live": "live teacher", "cached": "cached teacher outputs"}[kind]
        axis.annotate(words, (rows.runs.iloc[-1], y.iloc[-1]), (-2, 6),
                      textcoords="offset points", ha="right", fontsize=8, color=colour)  # fmt: skip
    axis.set(xscale="log", xlabel="distilled runs of one teacher", ylabel="cost / cost without a teacher")
    axis.set_xticks(rows.runs, [str(k) for k in rows.runs])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    sns.despine(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """A vector PDF with the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"CreationDate": None, "Producer": None, "Creator": None})
