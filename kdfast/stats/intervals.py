"""Estimates that join several sources of variance: training seeds, test images, teachers. Gains are in percentage points.

Intervals are two-sided, of 95 % unless told otherwise. A cell is a teacher, a student and a method; `distilled` is what
`kdfast.stats.paired.gains` returns. Where several runs of a cell have one seed (arguments of a method), they are averaged first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import pandas as pd
from scipy import stats

from kdfast.core.errors import KdfastError
from kdfast.stats.paired import CELL, Estimate, t_interval

LEAST_TEACHERS = 5  # for a verdict on teachers
ALL_ORDERS, ORDERS = 7, 2000  # up to so many teachers every order is tried, beyond them so many


def image_variance(distilled: np.ndarray, alone: np.ndarray) -> float:
    """Variance, in points², of the mean gain due to the draw of the test images; arguments are (seeds, images) of 0 and 1.

    Images and seeds cross: what is peculiar to an image in one seed is already part of the variance over seeds, so that its mean
    square is taken off the variance over images of the mean over seeds (two-way random effects; Searle, Casella and McCulloch,
    Variance Components, 1992). A single seed cannot tell the two apart: the result is then too large rather than too small.
    """
    d = 100 * (np.asarray(distilled, dtype=float) - np.asarray(alone, dtype=float))
    seeds, images = d.shape
    both = d.mean(0).var(ddof=1)
    if seeds == 1:
        return float(both / images)
    residual = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    peculiar = (residual**2).sum() / ((seeds - 1) * (images - 1))
    return float(max(both - peculiar / seeds, 0) / images)


def image_variances(distilled: pd.DataFrame, correct: Callable[[str], np.ndarray], by: Sequence[str] = CELL) -> pd.Series:
    """`image_variance` of every cell, or of the average gain of other groups (`by=["pair"]`), indexed by `by`.

    `correct` gives a run's (images,) of 0 and 1 from its id: the same images in the same order in all seeds.
    """
    hits = cache(lambda run: np.asarray(correct(run), dtype=np.float32))
    found = {}
    for key, group in distilled.groupby(list(by)):
        alone, taught = (
            np.stack([np.mean([hits(run) for run in runs], axis=0) for _, runs in group.groupby("seed")[ids]])
            for ids in ("baseline_id", "id")
        )
        found[key] = image_variance(taught, alone)
    return pd.Series(found.values(), pd.MultiIndex.from_tuples(found, names=list(by)), name="image_variance")


def seed_variance(values: np.ndarray, student: np.ndarray) -> tuple[float, float]:
    """Variance over seeds of a cell's gain, pooled over the cells, and its degrees of freedom (0: there is none).

    `values`: gains in points (cells, seeds), NaN where a cell lacks a seed; `student`: (cells,). Cells of one student share its
    undistilled run, which correlates them by a half where both runs are equally noisy; the pooled sum of squares then varies as
    one of fewer degrees of freedom (Box, Annals of Mathematical Statistics 25, 1954).
    """
    there = np.isfinite(values)
    n = there.sum(1)
    nominal = (n - 1).sum()
    if nominal == 0:
        return np.nan, 0.0
    squares = np.nansum((values - np.nanmean(values, 1, keepdims=True)) ** 2)
    shared = there.astype(float) @ there.T
    trace = shared - shared / n - shared / n[:, None] + shared**2 / np.outer(n, n)  # of the product of two cells' centrings
    correlation = np.where(student == student[:, None], 0.5, 0.0)
    np.fill_diagonal(correlation, 1)
    return float(squares / nominal), float(nominal**2 / (correlation**2 * trace).sum())


def cell_estimates(
    distilled: pd.DataFrame,
    image_variance: pd.Series | None = None,
    within: Sequence[str] = (),
    confidence: float = 0.95,
) -> pd.DataFrame:
    """One row a cell: `mean`, `low`, `high`, `n`, `p` (t test), and `spread`, the standard deviation over seeds, in points.

    The seed variance is pooled over all cells, or over those that agree in the columns `within` (["student"] where students
    differ in spread), see `seed_variance`; `df` are its degrees of freedom. `image_variance` (points², as from `image_variances`)
    is that of the test images, taken as known; without it the interval is for these test images only. A cell of one seed
    borrows the others' variance.
    """
    cells = [*(name for name in within if name not in CELL), *(name for name in CELL if name in distilled)]
    by_seed = distilled.groupby([*cells, "seed"]).gain.mean().unstack("seed").dropna(how="all")
    table, values = by_seed.index.to_frame(index=False), by_seed.to_numpy()
    pools = table.groupby(list(within)).indices.values() if within else [np.arange(len(table))]
    variance, df, student = np.empty(len(table)), np.empty(len(table)), table.student.to_numpy()
    for rows in pools:
        variance[rows], df[rows] = seed_variance(values[rows], student[rows])
    n, mean = np.isfinite(values).sum(1), np.nanmean(values, 1)
    known = 0.0 if image_variance is None else image_variance.reindex(by_seed.index).to_numpy()
    low, high, p = t_interval(mean, variance / n, df, known, confidence)
    return table.assign(mean=mean, low=low, high=high, n=n, p=p, spread=np.sqrt(variance), df=df)


def gap_recovered(distilled: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """One row a cell: (S_KD − S) / (T − S) of mean accuracies, a fraction; NaN (withheld) where the teacher is not better.

    `low`, `high`: Fieller's interval of a ratio (JRSS B 16, 1954) over seeds; infinite where the gap T − S may well be zero.
    """
    cells = [name for name in CELL if name in distilled]
    gap = 100 * (distilled.teacher_top1 - distilled.baseline_top1)
    by_seed = distilled.assign(gap=gap).groupby([*cells, "seed"])[["gain", "gap"]].mean()
    rows = [(*key, *_ratio(cell, confidence), len(cell)) for key, cell in by_seed.groupby(level=cells)]
    return pd.DataFrame(rows, columns=[*cells, "recovered", "low", "high", "n"])


def _ratio(cell: pd.DataFrame, confidence: float) -> tuple[float, float, float]:
    """Of the mean gain to the mean gap: the values r for which the t interval of gain − r · gap holds zero."""
    (gain, gap), n = cell.mean(), len(cell)
    if not gap > 0:
        return np.nan, np.nan, np.nan
    error = stats.t.ppf((1 + confidence) / 2, n - 1) ** 2 * cell.cov().to_numpy() / n if n > 1 else np.full((2, 2), np.inf)
    a, b, c = gap**2 - error[1, 1], gain * gap - error[0, 1], gain**2 - error[0, 0]
    if a <= 0:
        return gain / gap, -np.inf, np.inf
    root = np.sqrt(max(b * b - a * c, 0))
    return gain / gap, (b - root) / a, (b + root) / a


@dataclass(frozen=True)
class TeacherQuality:
    """How students' accuracy goes with their teachers'; `n` of both estimates is the number of seeds."""

    rho: Estimate  # Spearman's, the mean over students; its p is that of exchanging teachers
    slope: Estimate  # points a point of the teacher's accuracy, or points a doubling of its parameters
    teachers: int
    students: int


def teacher_quality(distilled: pd.DataFrame, by: str = "teacher_top1", confidence: float = 0.95) -> TeacherQuality | None:
    """Does a better (`teacher_top1`) or larger (`teacher_parameters`) teacher make a better student? None below five teachers.

    From means over seeds: ρ is averaged over students, the slope is that of one line with an intercept a student. Give the rows
    of one `pair` for the answer within or across families. Students with fewer than five teachers, or with teachers all alike,
    do not count, nor do seeds that a cell lacks.

    The intervals join two variances. Teachers: for ρ that of Fisher's z, (1 + ρ²/2) / (teachers − 3) (Bonett and Wright,
    Psychometrika 65, 2000), not divided by the number of students, who share their teachers; for the slope the jackknife over
    teachers. Seeds: the jackknife over seeds, which leaves out a seed's teachers together with the students whom they taught.
    The scatter over teachers holds some of the seeds' noise already, so that the sum is rather too large. A single seed has no
    interval, and p values and intervals for ρ need not agree.
    """
    x, y = _by_teacher(distilled, by)
    teachers, students, seeds = y.shape
    if students == 0:
        return None
    each, taught = _rho(x.mean(1)[None], y.mean(2))[0], np.isfinite(y.mean(2)).sum(0)
    rho, p, least = float(each.mean()), *_exchanged(x.mean(1), y.mean(2))
    z_of_teachers = np.mean((1 + each**2 / 2) / (taught - 3))
    slope_of_teachers = _jackknife([_slope(np.delete(x, j, 0), np.delete(y, j, 0)) for j in range(teachers)])
    z_of_seeds, slope_of_seeds = (
        _jackknife([f(np.delete(x, k, 1), np.delete(y, k, 2)) for k in range(seeds)]) if seeds > 1 else np.nan
        for f in (_z, _slope)
    )
    low, high, _ = t_interval(_z(x, y), z_of_seeds, seeds - 1, z_of_teachers, confidence)
    if seeds > 1:
        low, high = min(np.tanh(low), rho), max(np.tanh(high), rho)
    slope, df = _slope(x, y), joint_df((slope_of_teachers, teachers - 2), (slope_of_seeds, seeds - 1))
    line = [float(v) for v in t_interval(slope, slope_of_teachers + slope_of_seeds, df, confidence=confidence)]
    return TeacherQuality(
        Estimate(rho, float(low), float(high), seeds, p, least),
        Estimate(slope, line[0], line[1], seeds, line[2], 0.0),
        teachers,
        students,
    )


def _by_teacher(distilled: pd.DataFrame, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the seeds that all cells have: x (teachers, seeds), y (teachers, students, seeds) in points, NaN where not taught."""
    differ = distilled.groupby("student").filter(lambda d: d.teacher.nunique() >= LEAST_TEACHERS and d[by].nunique() > 1)
    if differ.empty:
        return np.empty((0, 0)), np.empty((0, 0, 0))
    scaled = np.log2(differ[by]) if by == "teacher_parameters" else 100 * differ[by]
    tables = pd.DataFrame({"x": scaled, "y": 100 * differ.test_top1}).groupby([differ.teacher, differ.student, differ.seed])
    tables = tables.mean().unstack("seed")
    whole = tables["y"].dropna(axis=1)
    if whole.empty:
        raise KdfastError("no seed has every teacher of these runs: teachers cannot be compared")
    x = tables["x"][whole.columns].groupby(level="teacher").mean()
    students = differ.student.unique()
    y = [whole.xs(student, level="student").reindex(x.index).to_numpy() for student in students]
    return x.to_numpy(), np.stack(y, axis=1)


def _z(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over students of Fisher's z of ρ; a perfect ρ is taken for one half its smallest step short of it, to be finite."""
    n = np.isfinite(y.mean(2)).sum(0)
    limit = 1 - 6 / (n * (n**2 - 1))
    return float(np.arctanh(np.clip(_rho(x.mean(1)[None], y.mean(2))[0], -limit, limit)).mean())


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of means over seeds, least squares with an intercept a student."""
    mean = y.mean(2)
    own = np.where(np.isfinite(mean), x.mean(1)[:, None], np.nan)
    own = own - np.nanmean(own, axis=0)
    return float(np.nansum(own * mean) / np.nansum(own**2))


def _rho(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ, (orders, students), of x (orders, teachers) with y (teachers, students); 0 where one is constant."""
    found = []
    for column in y.T:
        there = np.isfinite(column)
        a, b = stats.rankdata(x[:, there], axis=1), stats.rankdata(column[there])
        a, b = a - a.mean(1, keepdims=True), b - b.mean()
        size = np.sqrt((a**2).sum(1) * (b**2).sum())
        found.append(np.divide(a @ b, size, out=np.zeros(len(a)), where=size > 0))
    return np.stack(found, axis=1)


def _exchanged(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """p of the mean ρ when teachers exchange their qualities, for all students alike, and the smallest attainable p."""
    if len(x) <= ALL_ORDERS:
        orders = np.array(list(permutations(range(len(x)))))
    else:
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(len(x)), (ORDERS, 1)), axis=1)
        orders[0] = np.arange(len(x))
    rho = np.abs(_rho(x[orders], y).mean(1))
    return float(np.mean(rho >= abs(_rho(x[None], y).mean()) - 1e-9)), (2 if len(x) <= ALL_ORDERS else 1) / len(orders)


def _jackknife(left_out: list[float]) -> float:
    """Variance of a statistic from its values without one unit each (Efron and Stein, Annals of Statistics 9, 1981)."""
    return (len(left_out) - 1) * float(np.var(left_out))


def joint_df(*parts: tuple[float, int]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances, each given with its own; 0 where one of them is unknown."""
    total = sum(variance for variance, _ in parts)
    return total**2 / sum(variance**2 / df for variance, df in parts) if total > 0 else min(df for _, df in parts)
