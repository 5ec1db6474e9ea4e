"""Paired comparisons of distilled against undistilled students, one value a seed. All gains are in percentage points.

Intervals are two-sided, of 95 % unless told otherwise. A cell is a teacher, a student and a method; `distilled` is what `gains`
returns. `kdfast.stats.intervals` joins further sources of variance: other cells' seeds, test images, teachers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, product

import numpy as np
import pandas as pd
from scipy import special, stats

from kdfast.core.errors import KdfastError
from kdfast.core.extras import extra

with extra("paper"):
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.power import TTestPower

Values = float | np.ndarray
CELL = ("teacher", "student", "method")
TINY, NORMAL_DF = 1e-300, 1e6  # points² that stand for none; degrees of freedom at which t is normal
EXACT_SEEDS, FLIPS = 12, 2**14  # up to so many seeds every flip of signs is tried, beyond them so many


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its confidence interval (infinite for a single seed), and a two-sided p of no effect."""

    mean: float
    low: float
    high: float
    n: int  # seeds
    p: float = np.nan
    least_p: float = np.nan  # the smallest p that the test can give with so few seeds; 0 for a t test

    @property
    def verdict(self) -> str:
        """`raises` or `lowers` where the interval leaves zero out, else `open`."""
        return "raises" if self.low > 0 else "lowers" if self.high < 0 else "open"


def t_interval(
    mean: Values, variance: Values, df: Values, known: Values = 0.0, confidence: float = 0.95
) -> tuple[Values, Values, Values]:
    """Low, high and p of a mean whose variance is estimated on `df` degrees of freedom, and joined by a known one; arrays too.

    The sum's degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946). Without any, the interval is infinite.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error, estimated = np.sqrt(variance + known), np.greater(df, 0)
        joint = np.minimum(df * (1 + known / np.maximum(variance, TINY)) ** 2, NORMAL_DF)
        half = np.where(estimated, special.stdtrit(joint, (1 + confidence) / 2) * error, np.inf)
        p = 2 * special.stdtr(joint, -np.where(np.equal(mean, 0), 0, np.abs(mean) / error))
    return mean - half, mean + half, np.where(estimated, p, np.nan)


def estimate(values: np.ndarray, confidence: float = 0.95, image_variance: float = 0.0) -> Estimate:
    """Mean of one value a seed, its t interval and p. `image_variance`: of the test images, see `kdfast.stats.intervals`."""
    x = np.asarray(values, dtype=float)
    mean, n = float(x.mean()), len(x)
    low, high, p = t_interval(mean, x.var(ddof=1) / n if n > 1 else np.nan, n - 1, image_variance, confidence)
    return Estimate(mean, float(low), float(high), n, float(p), 0.0)


def gains(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a distilled run: its accuracy, its undistilled twin's (same seed), the gain in points, and the twin's id.

    The twin is trained alike; where a study trains distilled runs otherwise (`distilled:`), it is the only baseline of the
    same student and seed, and the gain is that of distillation together with the difference.
    """
    trained = [key for key in ("student", "seed", "epochs", "batch_size", "lr", "weight_decay") if key in runs]
    baselines, distilled = runs[runs.teacher.isna()], runs[runs.teacher.notna()].copy()
    only = baselines.groupby(["student", "seed"]).filter(lambda twins: len(twins) == 1)
    for column, name in (("test_top1", "baseline_top1"), ("id", "baseline_id")):
        if column in runs:
            alike, other = (
                twins.set_index(keys)[column].reindex(pd.MultiIndex.from_frame(distilled[keys])).to_numpy()
                for twins, keys in ((baselines, trained), (only, ["student", "seed"]))
            )
            distilled[name] = np.where(pd.isna(alike), other, alike)
    distilled["gain"] = 100 * (distilled.test_top1 - distilled.baseline_top1)
    return distilled


def family_test(distilled: pd.DataFrame, confidence: float = 0.95, image_variance: float = 0.0) -> Estimate:
    """The average gain over all cells of a family, its t interval over seeds, and the p of flipping signs.

    Averaged over the cells first, seed by seed: cells of one seed share their undistilled student and their teachers, so that
    only seeds are independent, and a flip turns the sign of a seed in all cells at once (Winkler et al., NeuroImage 92, 2014,
    whole-block exchangeability). Only seeds that every cell has count, so that no seed stands for fewer cells.
    """
    return _paired(_by_seed(distilled).mean(axis=1).to_numpy(), confidence, image_variance)


def family_gain(distilled: pd.DataFrame) -> Estimate:
    """`family_test` as it is called where only the interval matters."""
    return family_test(distilled)


def with_both(distilled: pd.DataFrame) -> pd.DataFrame:
    """The runs of students that have same- and cross-architecture teachers: of others, the families would differ in students."""
    kinds = distilled.groupby("student").pair.transform("nunique")
    return distilled[kinds == 2]


def family_difference(distilled: pd.DataFrame, confidence: float = 0.95, image_variance: float = 0.0) -> Estimate:
    """The average gain of same-architecture cells minus that of cross-architecture cells, in points, paired by seed.

    It is taken student by student, of those that have both, and averaged: the families' averages would weigh students
    differently. That does not make the families' teachers equally good or large.
    """
    table = _by_seed(distilled).T
    means = table.groupby(level=["student", "pair"]).mean()
    if {"same", "cross"} - set(means.index.get_level_values("pair")):
        raise KdfastError("the study does not hold both same- and cross-architecture pairs")
    difference = means.xs("same", level="pair") - means.xs("cross", level="pair")
    if difference.dropna().empty:
        raise KdfastError("no student has both same- and cross-architecture pairs")
    return _paired(difference.dropna().mean().to_numpy(), confidence, image_variance)


def _by_seed(distilled: pd.DataFrame) -> pd.DataFrame:
    """Gains in points, a row a seed that every cell has, a column a cell (its `pair` too); several runs of one are averaged."""
    cells = [name for name in ("pair", *CELL) if name in distilled]
    table = distilled.groupby(["seed", *cells]).gain.mean().unstack(cells).dropna(axis=1, how="all").dropna()
    if table.empty:
        raise KdfastError("no seed has every cell (teacher, student, method) of these runs: nothing can be paired")
    return table


def _paired(values: np.ndarray, confidence: float, image_variance: float) -> Estimate:
    e = estimate(values, confidence, image_variance)
    return Estimate(e.mean, e.low, e.high, e.n, *sign_flip(values))


def sign_flip(values: np.ndarray) -> tuple[float, float]:
    """p of the mean being zero, and the smallest attainable p: the share of flips of signs whose mean is as far from zero.

    Exact under symmetry about zero up to 12 seeds, where n seeds attain 2^(1 − n): 0.25 for 3, 0.0625 for 5. Holds for the test
    images at hand.
    """
    x = np.asarray(values, dtype=float)
    if len(x) <= EXACT_SEEDS:
        signs = np.array(list(product((1.0, -1.0), repeat=len(x))))
        least = 2 / len(signs)
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (FLIPS, len(x)))
        signs[0] = 1
        least = 1 / FLIPS
    return float(np.mean(np.abs(signs @ x) >= abs(x.sum()) - 1e-9 * np.abs(x).sum())), least


def adjusted(p: Sequence[float], method: str = "holm") -> np.ndarray:
    """p values corrected for their number: `holm` (family-wise error) or `fdr_bh` (Benjamini–Hochberg). NaN stays, uncounted."""
    given = np.asarray(p, dtype=float)
    found, known = given.copy(), np.isfinite(given)
    if known.any():
        found[known] = multipletests(given[known], method=method)[1]
    return found


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Spearman's ρ and its two-sided permutation p; NaN for fewer than five points or where one of them is constant."""
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan

    def rho(permuted):
        return stats.spearmanr(permuted, y).statistic

    test = stats.permutation_test((x,), rho, permutation_type="pairings", n_resamples=2000, rng=np.random.default_rng(0))
    return float(test.statistic), float(test.pvalue)


def power_table(spread: float, gains: Sequence[float] = (0.3, 0.5, 1.0), power: float = 0.8, alpha: float = 0.05) -> pd.DataFrame:
    """Seeds that a two-sided paired t test needs to find a gain (points) with this power; columns `gain`, `seeds`.

    `spread`: standard deviation over seeds of a paired gain, in points, as from `kdfast.stats.intervals.cell_estimates`. The test
    images are taken as given: no number of seeds reduces their variance.
    """
    return pd.DataFrame([{"gain": gain, "seeds": _seeds_needed(gain / spread, power, alpha)} for gain in gains])


def _seeds_needed(effect: float, power: float, alpha: float) -> int:
    """From what a normal test would need, upwards: the t test needs a few more."""
    if effect > 50:  # so sure that the power function gives out
        return 2
    normal = (stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) / effect
    return next(n for n in count(max(2, int(normal**2))) if TTestPower().power(effect, n, alpha) >= power)
