"""A study's distilled students beside their undistilled twins: gains, their estimates cell by cell, and families of cells."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from kdfast.core.predictions import correct, read_predictions
from kdfast.stats.intervals import cell_estimates, gap_recovered, image_variance, image_variances
from kdfast.stats.paired import CELL, Estimate, adjusted, family_test, gains, with_both


@dataclass(frozen=True)
class Comparison:
    """`cells`: one row a cell (teacher, student, method): `pair`, the estimates of `kdfast.stats.intervals.cell_estimates`,
    `holm` (p corrected within its family of pairs), `bh` (within all) and `recovered` (fraction of the gap to the teacher).
    """

    baselines: pd.DataFrame  # runs without a teacher
    distilled: pd.DataFrame  # `kdfast.stats.paired.gains`
    cells: pd.DataFrame
    images: dict[str, float]  # variance (points²) of families' average gains and their difference due to the draw of test images

    def family(self, name: str) -> pd.DataFrame:
        """The distilled runs of `same`- or `cross`-architecture pairs, or `all`."""
        return self.distilled if name == "all" else self.distilled[self.distilled.pair == name]

    def cells_of(self, name: str) -> pd.DataFrame:
        return self.cells if name == "all" else self.cells[self.cells.pair == name]

    def average(self, name: str) -> Estimate:
        """The average gain over a family's cells, with an interval for seeds and, where known, test images."""
        return family_test(self.family(name), image_variance=self.images.get(name, 0.0))


def compare(runs: pd.DataFrame, paths: Iterable[str | Path] | None = None) -> Comparison:
    """Of a tidy table of runs; `paths`: their records', beside which lie the predictions that give the test images' variance."""
    distilled = gains(runs)
    baselines = runs[runs.teacher.isna()]
    if distilled.empty:
        return Comparison(baselines, distilled, pd.DataFrame(columns=[*CELL, "pair"]), {})
    hits = _hits(runs, paths) if paths is not None else None
    variances = None if hits is None else image_variances(distilled, hits)
    cells = cell_estimates(distilled, variances)
    keys = [name for name in CELL if name in distilled]
    pairs = distilled.drop_duplicates(keys)[[*keys, "pair"]]
    cells = cells.merge(pairs, on=keys).merge(gap_recovered(distilled)[[*keys, "recovered"]], on=keys)
    cells["holm"] = cells.groupby("pair").p.transform(lambda p: adjusted(p, "holm"))
    cells["bh"] = adjusted(cells.p, "fdr_bh")
    return Comparison(baselines, distilled, cells, {} if hits is None else _of_families(distilled, hits))


def _hits(runs: pd.DataFrame, paths: Iterable[str | Path]) -> Callable[[str], np.ndarray]:
    by_id = dict(zip(runs.id, paths, strict=True))
    return cache(lambda run: correct(read_predictions(by_id[run])))


def _of_families(distilled: pd.DataFrame, hits: Callable[[str], np.ndarray]) -> dict[str, float]:
    by_pair = image_variances(distilled, hits, by=["pair"])
    whole = image_variances(distilled.assign(family="all"), hits, by=["family"])
    found = {key[0]: float(value) for series in (by_pair, whole) for key, value in series.items()}
    both = with_both(distilled)
    if len(both):
        found["difference"] = image_variance(*(_by_student(both[both.pair == pair], hits) for pair in ("same", "cross")))
    return found


def _by_student(distilled: pd.DataFrame, hits: Callable[[str], np.ndarray]) -> np.ndarray:
    """(seeds, images): `_gains` of each student, averaged over students."""
    return np.mean([_gains(part, hits) for _, part in distilled.groupby("student")], axis=0)


def _gains(distilled: pd.DataFrame, hits: Callable[[str], np.ndarray]) -> np.ndarray:
    """(seeds, images): on each image the mean over the cells of what distillation changes."""
    rows = []
    for _, group in distilled.groupby("seed"):
        changes = [hits(run.id).astype(float) - hits(run.baseline_id) for run in group.itertuples()]
        rows.append(np.mean(changes, axis=0))
    return np.stack(rows)
