"""Paired comparisons of distilled against undistilled students, seed by seed. All gains are in percentage points."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % confidence interval (Student's t; infinite for a single seed)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """`raises` or `lowers` where the interval leaves zero out, else `open`."""
        return "raises" if self.low > 0 else "lowers" if self.high < 0 else "open"


def estimate(values: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean and t interval of one value a seed."""
    x = np.asarray(values, dtype=float)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return Estimate(mean, -np.inf, np.inf, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def gains(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a distilled run: its accuracy, its undistilled twin's (same seed) and the gain in points.

    The twin is trained alike; where a study trains distilled runs otherwise (`distilled:`), it is the only plain run of the
    same student and seed, and the gain is that of distillation together with the difference.
    """
    trained = [key for key in ("student", "seed", "epochs", "batch_size", "lr", "weight_decay") if key in runs]
    plain, distilled = runs[runs.teacher.isna()], runs[runs.teacher.notna()].copy()
    only = plain.groupby(["student", "seed"]).filter(lambda twins: len(twins) == 1)
    alike = plain.set_index(trained).test_top1.reindex(pd.MultiIndex.from_frame(distilled[trained])).to_numpy()
    other = only.set_index(["student", "seed"]).test_top1.reindex(pd.MultiIndex.from_frame(distilled[["student", "seed"]]))
    distilled["alone_top1"] = np.where(np.isnan(alike), other.to_numpy(), alike)
    distilled["gain"] = 100 * (distilled.test_top1 - distilled.alone_top1)
    return distilled


def family_gain(distilled: pd.DataFrame) -> Estimate:
    """The average gain over all cells (teacher, student, method) of a family.

    Averaged over the cells first, seed by seed: cells of one seed share their undistilled student and their teachers,
    so that only seeds are independent.
    """
    return estimate(distilled.groupby("seed").gain.mean().to_numpy())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Spearman's ρ and its two-sided permutation p; NaN for fewer than five points or where one of them is constant."""
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan

    def rho(permuted):
        return stats.spearmanr(permuted, y).statistic

    test = stats.permutation_test((x,), rho, permutation_type="pairings", n_resamples=2000, rng=np.random.default_rng(0))
    return float(test.statistic), float(test.pvalue)
