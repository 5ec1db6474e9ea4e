"""What the runs of a study say, as tables and as sentences that hold for any outcome. TeX source throughout."""

import numpy as np
import pandas as pd

from kdfast.report.figures import short
from kdfast.report.latex import interval, tex
from kdfast.stats.comparison import Comparison
from kdfast.stats.intervals import LEAST_TEACHERS, TeacherQuality, teacher_quality
from kdfast.stats.paired import Estimate, adjusted, estimate, family_difference, power_table, with_both

SURE = 0.05  # of p values corrected for their number
NAMES = {"same": "same-architecture", "cross": "cross-architecture", "all": "teacher--student"}
VERDICTS = {
    "raises": "the interval lies above zero, so distillation raised the student's accuracy",
    "lowers": "the interval lies below zero, so distillation lowered the student's accuracy",
    "open": "the interval includes zero, so no effect of distillation is shown",
}


def percent(values: pd.Series) -> str:
    """Mean and standard deviation over seeds of an accuracy, in %."""
    spread = f" $\\pm$ {100 * values.std():.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{spread}"


def p_value(p: float) -> str:
    """`= 0.03`, or `< 0.001`; `--` where there is none."""
    return "--" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"= {p:.{3 if p < 0.01 else 2}f}"


# Families of pairs


def pair_table(c: Comparison, family: str) -> pd.DataFrame:
    """One row a cell: accuracies in % (mean ± s.d. over seeds), the paired gain in points, its corrected p, the gap recovered."""
    rows = []
    for cell in c.cells_of(family).itertuples():
        runs = c.distilled[(c.distilled.student == cell.student) & (c.distilled.teacher == cell.teacher)]
        baseline = c.baselines[c.baselines.student == cell.student].test_top1
        rows.append({
            "student": tex(short(cell.student)),
            "teacher": tex(short(cell.teacher)),
            "teacher (\\%)": percent(runs.teacher_top1),
            "baseline (\\%)": percent(baseline),
            "distilled (\\%)": percent(runs.test_top1),
            "gain [95\\,\\%]": interval(Estimate(cell.mean, cell.low, cell.high, cell.n)),
            "$p$": p_value(cell.holm).removeprefix("= "),
            "$n$": cell.n,
            "gap (\\%)": "--" if not np.isfinite(cell.recovered) else f"{100 * cell.recovered:.0f}",
            "_order": (cell.student, -runs.teacher_top1.mean()),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("_order").drop(columns="_order")


def family_sentence(c: Comparison, family: str) -> str:
    """The average gain of a family of pairs with its interval, what that shows, and how many pairs agree."""
    cells, name = c.cells_of(family), NAMES[family]
    if cells.empty:
        return f"This study has no {name} pair."
    whole, n = c.average(family), len(cells)
    said = (
        f"Averaged over {n} {name} pair{'s' * (n > 1)} and {whole.n} seed{'s' * (whole.n > 1)}, distillation changes "
        f"the student's test accuracy by {interval(whole)} points"
    )
    if whole.n < 2:
        return said + "; one seed allows no interval and hence no verdict."
    sure = cells[adjusted(cells.p) <= SURE]  # of those that are counted here
    up, down = (sure["mean"] > 0).sum(), (sure["mean"] < 0).sum()
    return (
        f"{said} (95\\,\\% interval): {VERDICTS[whole.verdict]}. Flipping signs seed by seed in all pairs at once gives $p "
        f"{p_value(whole.p)}$, and {whole.n} seeds cannot give less than {whole.least_p:.2g}. Pair by pair, corrected for their "
        f"number (Holm), {_count(up, n)} gain and {_count(down, n)} lose.{_recovered(cells)}"
    )


def _recovered(cells: pd.DataFrame) -> str:
    known = cells.recovered.dropna()
    if known.empty:
        return ""
    missing = len(cells) - len(known)
    note = f" (not reported for {missing}: the teacher is not better than the baseline)" if missing else ""
    return f" In the median pair, {100 * known.median():.0f}\\,\\% of the gap to the teacher is recovered{note}."


def _count(k: int, n: int) -> str:
    if n == 1:
        return "the pair does" if k else "it does not"
    return f"{'none' if k == 0 else 'all' if k == n else k} of the {n} pairs"


def same_or_cross(c: Comparison) -> str:
    """The difference of the families' average gains, paired by seed, over the students that have both."""
    both = with_both(c.distilled) if len(c.distilled) else c.distilled
    if both.empty:
        return "No student of the study has both same- and cross-architecture teachers, so the two cannot be compared."
    difference = family_difference(both, image_variance=c.images.get("difference", 0.0))
    said = f"Same-architecture pairs gain {interval(difference)} points more than cross-architecture pairs"
    if both.student.nunique() < c.distilled.student.nunique():
        said += f" of the same student ({', '.join(map(tex, both.student.unique()))}; the others have no teachers of both kinds)"
    if difference.n < 2:
        return said + "; one seed allows no verdict."
    verdict = {
        "raises": "a teacher of the student's own family was the better choice here",
        "lowers": "a teacher of another family was the better choice here",
        "open": "it is not shown that the family matters",
    }[difference.verdict]
    return (
        f"{said} (95\\,\\% interval, paired by seed; flipping signs gives $p {p_value(difference.p)}$, and not less than "
        f"{difference.least_p:.2g}): {verdict}."
    )


def better_teacher(c: Comparison) -> str:
    """How students' accuracy goes with their teachers', over all pairs, within and across families, and with teachers' size."""
    if c.distilled.empty:
        return "This study distils nothing."
    whole = teacher_quality(c.distilled)
    if whole is None:
        return f"Fewer than {LEAST_TEACHERS} teachers of a student differ in accuracy: no verdict on better teachers."
    sentences = [_relation("Over all pairs", whole, "accuracy", "a better teacher")]
    for family, where in (("same", "Within families"), ("cross", "Across families")):
        part = teacher_quality(c.family(family)) if len(c.family(family)) else None
        if part is not None:
            sentences.append(_relation(where, part, "accuracy", "a better teacher"))
    size = teacher_quality(c.distilled, "teacher_parameters")
    if size is not None:
        sentences.append(_relation("By size", size, "size", "a larger teacher"))
    return " ".join(sentences)


def _relation(where: str, q: TeacherQuality, what: str, teacher: str) -> str:
    slope = "a point of the teacher's" if what == "accuracy" else "a doubling of the teacher's parameters"
    verdict = {
        "raises": f"{teacher} went with a better student",
        "lowers": f"{teacher} went with a worse student",
        "open": f"no evidence that {teacher} makes a better student",
    }[q.rho.verdict]
    return (
        f"{where}, the rank correlation of the {q.teachers} teachers' {what} with their students' accuracy is {interval(q.rho)} "
        f"($p {p_value(q.rho.p)}$, permutation test), {interval(q.slope)} points {slope}: {verdict}."
    )


def beats_teacher(c: Comparison) -> str:
    """In how many pairs the student ends above its teacher, distilled and even as the baseline."""
    if c.distilled.empty:
        return "This study distils nothing."
    means = c.distilled.groupby(["teacher", "student"])[["teacher_top1", "test_top1", "baseline_top1"]].mean()
    above, even = means[means.test_top1 > means.teacher_top1], (means.baseline_top1 > means.teacher_top1).sum()
    if above.empty:
        also = f" (in {even} of {len(means)} pairs the baseline is)" if even else ""
        return f"No distilled student is, on average, more accurate than its teacher{also}."
    names = ", ".join(f"{tex(short(s))} above {tex(short(t))}" for t, s in above.index)
    return (
        f"In {len(above)} of {len(means)} pairs the distilled student is on average more accurate than its teacher ({names}); in "
        f"{even} the baseline is, too."
    )


def decided(c: Comparison) -> pd.DataFrame:
    """Teacher × student: whether the gain differs from zero when all pairs are corrected for (Benjamini–Hochberg)."""
    table = c.cells.assign(sure=c.cells.bh <= SURE).pivot_table(index="teacher", columns="student", values="sure", aggfunc="any")
    return table.fillna(False).astype(bool)


def power(c: Comparison) -> str:
    """With the spread seen, how many seeds a gain of 0.3, 0.5 or 1 point needs."""
    spread = float(c.cells.spread.mean()) if len(c.cells) else np.nan
    if not spread > 1e-6:
        return "The spread over seeds is not known, so that the seeds needed for a given gain cannot be said."
    needed = power_table(spread)
    seeds = ", ".join(f"{row.gain:g} ({row.seeds} seeds)" for row in needed.itertuples())
    return (
        f"A pair's gain has a standard deviation of {spread:.2f} points over seeds. To find a gain in a single pair with a power "
        f"of 80\\,\\% at 5\\,\\%, as many seeds are needed, by points: {seeds}."
    )


def baseline_table(baselines: pd.DataFrame) -> pd.DataFrame:
    """Every network trained without a teacher, smallest first within its family."""
    rows = [
        {
            "network": tex(short(model)),
            "family": tex(runs.family.iloc[0]),
            "parameters": f"{runs.parameters.iloc[0]:,d}",
            "learning rate": f"{runs.lr.iloc[0]:g}",
            "test accuracy (\\%)": percent(runs.test_top1),
            "test NLL": f"{runs.test_nll.mean():.3f}",
            "seeds": len(runs),
            "_order": (runs.family.iloc[0], runs.parameters.iloc[0]),
        }
        for model, runs in baselines.groupby("student")
    ]
    return pd.DataFrame(rows).sort_values("_order").drop(columns="_order")


# Methods


def method_gains(c: Comparison) -> pd.DataFrame:
    """One row a method and pair: the gain's mean and interval, methods in the order of their average gain."""
    seconds = c.distilled.groupby(["teacher", "student", "method"]).training_s.median().rename("training_s").reset_index()
    table = c.cells.merge(seconds, on=["teacher", "student", "method"])
    table["estimate"] = [Estimate(r.mean, r.low, r.high, r.n) for r in table.itertuples()]
    order = table.groupby("method")["mean"].mean().sort_values(ascending=False).index
    return table.sort_values(["method", "pair"], key=lambda k: k.map(order.get_loc) if k.name == "method" else k)


def methods_table(c: Comparison) -> pd.DataFrame:
    """`method_gains` as it is printed, with the median training time relative to the fastest method's on the same pair."""
    gains = method_gains(c)
    fastest = gains.groupby(["teacher", "student"]).training_s.transform("min")
    return pd.DataFrame({
        "method": gains.method.map(tex),
        "teacher": gains.teacher.map(short).map(tex),
        "student": gains.student.map(short).map(tex),
        "gain, points [95\\,\\%]": gains.estimate.map(interval),
        "training (s)": gains.training_s.map("{:.1f}".format),
        "to the fastest": (gains.training_s / fastest).map("{:.2f}".format),
    })  # fmt: skip


def methods_sentence(c: Comparison) -> str:
    """How many methods gain, lose or leave it open, corrected for their number, and which leads."""
    by_method = {m: estimate(runs.groupby("seed").gain.mean().to_numpy()) for m, runs in c.distilled.groupby("method")}
    corrected = dict(zip(by_method, adjusted([e.p for e in by_method.values()]), strict=True))
    sure = [m for m, p in corrected.items() if p <= SURE]
    up, down = [m for m in sure if by_method[m].mean > 0], [m for m in sure if by_method[m].mean < 0]
    best = max(by_method, key=lambda m: by_method[m].mean)
    pairs, n = c.distilled.groupby(["teacher", "student"]).ngroups, len(by_method)
    if c.distilled.seed.nunique() < 2:
        return f"{n} methods were run with one seed, which allows no verdict; the largest gain is that of {tex(best)}."
    flatters = f"; being the largest of {n}, it flatters" if n > 1 else ""
    return (
        f"Of {n} method{'s' * (n > 1)}, averaged over {pairs} pair{'s' * (pairs > 1)} and corrected for their number (Holm), "
        f"{len(up)} raise the student's accuracy ({_list(up)}) and {len(down)} lower it ({_list(down)}). The largest mean gain "
        f"is that of {tex(best)}, {interval(by_method[best])} points (its own 95\\,\\% interval over seeds){flatters}."
    )


def _list(names: list[str]) -> str:
    return ", ".join(tex(name) for name in names) or "none"
