"""What the runs of a study say, as tables and as sentences that hold for any outcome. TeX source throughout."""

import numpy as np
import pandas as pd

from kdfast.plots import short
from kdfast.report import interval, signed, tex
from kdfast.stats import Estimate, estimate, family_gain, rank_correlation
from kdfast.study import Study

VERDICTS = {
    "raises": "the interval lies above zero, so distillation raised the student's accuracy",
    "lowers": "the interval lies below zero, so distillation lowered the student's accuracy",
    "open": "the interval includes zero, so no effect of distillation is shown",
}


def percent(values: pd.Series) -> str:
    """Mean and standard deviation over seeds of an accuracy, in %."""
    spread = f" $\\pm$ {100 * values.std():.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{spread}"


def cell_gain(cell: pd.DataFrame) -> Estimate:
    """The gain of one teacher–student pair over seeds; several methods are averaged seed by seed."""
    return estimate(cell.groupby("seed").gain.mean().to_numpy())


def pair_table(distilled: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """One row a teacher–student pair: accuracies in % (mean ± s.d. over seeds) and the paired gain in points."""
    rows = []
    for (student, teacher), cell in distilled.groupby(["student", "teacher"]):
        alone = plain[plain.student == student].test_top1
        rows.append({
            "student": tex(short(student)),
            "teacher": tex(short(teacher)),
            "teacher (\\%)": percent(cell.teacher_top1),
            "alone (\\%)": percent(alone),
            "distilled (\\%)": percent(cell.test_top1),
            "gain, points [95\\,\\%]": interval(cell_gain(cell)),
            "_order": -cell.teacher_top1.mean(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values(["student", "_order"]).drop(columns="_order")


def family_sentence(distilled: pd.DataFrame, family: str) -> str:
    """The average gain of a family of pairs with its interval, what that shows, and how many pairs agree."""
    if distilled.empty:
        return f"This study has no {family} pair."
    whole, cells = family_gain(distilled), [cell_gain(cell) for _, cell in distilled.groupby(["teacher", "student"])]
    n = len(cells)
    said = (
        f"Averaged over {n} {family} pair{'s' * (n > 1)} and {whole.n} seed{'s' * (whole.n > 1)}, distillation changes "
        f"the student's test accuracy by {interval(whole)} points"
    )
    if whole.n < 2:
        return said + "; one seed allows no interval and hence no verdict."
    up, down = (sum(c.verdict == v for c in cells) for v in ("raises", "lowers"))
    return (
        f"{said} (95\\,\\% interval): {VERDICTS[whole.verdict]}. Taken one by one and without correction for their number, "
        f"{_count(up, n)} gain and {_count(down, n)} lose beyond their own interval."
    )


def _count(k: int, n: int) -> str:
    return (
        f"{'none' if k == 0 else 'all' if k == n else k} of the {n} pairs" if n > 1 else ("the pair does" if k else "it does not")
    )


def same_or_cross(distilled: pd.DataFrame) -> str:
    """The difference of the families' average gains, paired by seed."""
    by_seed = distilled.pivot_table(index="seed", columns="pair", values="gain")
    if {"same", "cross"} - set(by_seed.columns):
        return "The study does not hold both same- and cross-architecture pairs, so the two cannot be compared."
    difference = estimate((by_seed["same"] - by_seed["cross"]).to_numpy())
    said = f"Same-architecture pairs gain {interval(difference)} points more than cross-architecture pairs"
    if difference.n < 2:
        return said + "; one seed allows no verdict."
    verdict = {
        "raises": "a teacher of the student's own family was the better choice here",
        "lowers": "a teacher of another family was the better choice here",
        "open": "it is not shown that the family matters",
    }[difference.verdict]
    return f"{said} (95\\,\\% interval, paired by seed): {verdict}."


def better_teacher(distilled: pd.DataFrame) -> str:
    """Rank correlation of teachers' and distilled students' mean accuracies, student by student."""
    sentences = []
    for student, runs in distilled.groupby("student"):
        means = runs.groupby("teacher")[["teacher_top1", "test_top1"]].mean()
        rho, p = rank_correlation(means.teacher_top1.to_numpy(), means.test_top1.to_numpy())
        name = f"For {tex(short(student))}"
        if not np.isfinite(rho):
            sentences.append(f"{name}, fewer than five teachers differ in accuracy: no verdict on better teachers.")
            continue
        shown = (
            "no evidence that a better teacher makes a better student" if p > 0.05
            else f"a better teacher went with a {'better' if rho > 0 else 'worse'} student"
        )  # fmt: skip
        sentences.append(
            f"{name}, the rank correlation of the {len(means)} teachers' accuracy with the student's is {signed(rho)} "
            f"(permutation $p={p:.2f}$): {shown}."
        )
    return " ".join(sentences)


def beats_teacher(distilled: pd.DataFrame) -> str:
    """In how many pairs the student ends above its teacher."""
    means = distilled.groupby(["teacher", "student"])[["teacher_top1", "test_top1"]].mean()
    above = means[means.test_top1 > means.teacher_top1]
    if above.empty:
        return "No distilled student is, on average, more accurate than its teacher."
    names = ", ".join(f"{tex(short(s))} above {tex(short(t))}" for t, s in above.index)
    return f"In {len(above)} of {len(means)} pairs the distilled student is on average more accurate than its teacher: {names}."


def decided(distilled: pd.DataFrame) -> pd.DataFrame:
    """Teacher × student: whether the gain's interval leaves zero out."""
    cells = {key: cell_gain(cell).verdict != "open" for key, cell in distilled.groupby(["teacher", "student"])}
    return pd.Series(cells).rename_axis(["teacher", "student"]).unstack(fill_value=False)


def plain_table(plain: pd.DataFrame) -> pd.DataFrame:
    """Every network trained alone, smallest first within its family."""
    rows = [
        {
            "network": tex(short(model)),
            "family": tex(runs.family.iloc[0]),
            "parameters": f"{runs.parameters.iloc[0]:,d}",
            "learning rate": f"{runs.lr.iloc[0]:g}",
            "test accuracy (\\%)": percent(runs.test_top1),
            "test NLL": f"{runs.test_nll.mean():.3f}",
            "_order": (runs.family.iloc[0], runs.parameters.iloc[0]),
        }
        for model, runs in plain.groupby("student")
    ]
    return pd.DataFrame(rows).sort_values("_order").drop(columns="_order")


def cost_table(distilled: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """Sizes and training times of every pair; times are medians over seeds, in seconds, the teacher's part a share of all."""
    alone = plain.groupby("student").training_s.median()
    rows = [
        {
            "student": tex(short(student)),
            "teacher": tex(short(teacher)),
            "times smaller": f"{cell.teacher_parameters.iloc[0] / cell.parameters.iloc[0]:.1f}",
            "alone (s)": f"{alone[student]:.1f}",
            "distilled (s)": f"{cell.training_s.median():.1f}",
            "ratio": f"{cell.training_s.median() / alone[student]:.2f}",
            "teacher's part (\\%)": f"{100 * cell.teacher_s.sum() / cell.training_s.sum():.1f}",
        }
        for (student, teacher), cell in distilled.groupby(["student", "teacher"])
    ]
    return pd.DataFrame(rows)


def cost_sentence(distilled: pd.DataFrame, plain: pd.DataFrame) -> str:
    """The range of the training-time ratios, the teacher's part, and what training the teachers cost beside it."""
    if distilled.empty:
        return "This study distils nothing, so there is no cost to compare."
    alone = plain.groupby("student").training_s.median()
    ratio = distilled.groupby(["student", "teacher"]).training_s.median() / alone
    teachers = plain[plain.student.isin(distilled.teacher)].groupby("student").training_s.median()
    live = (distilled.knowledge == "live").sum()
    source = "a live teacher" if live == len(distilled) else "stored answers of the teacher"
    mixed = f" (a live teacher in {live} of {len(distilled)} runs)" if 0 < live < len(distilled) else ""
    return (
        f"Training with {source}{mixed} took {ratio.min():.2f} to {ratio.max():.2f} times as long as training the student "
        f"alone (median over seeds), {ratio.median():.2f} times in the median pair. Asking the teachers was "
        f"{100 * distilled.teacher_s.sum() / distilled.training_s.sum():.1f}\\,\\% of the distilled runs' training time. "
        "The teacher has to be trained first, "
        f"which took {teachers.min():.1f} to {teachers.max():.1f} seconds against {alone[distilled.student.unique()].min():.1f} "
        f"to {alone[distilled.student.unique()].max():.1f} for a student alone. Several runs shared the machine, so that "
        "seconds are indicative and only ratios are compared. Inference is unchanged by distillation: what a student saves "
        "is its size against the teacher's."
    )


def sweep_table(study: Study, plain: pd.DataFrame) -> pd.DataFrame:
    """Mean validation NLL of every model at every value of the swept parameter, the lowest in bold."""
    (swept,) = study.sweep
    table = plain.pivot_table(index="student", columns=swept, values="valid_nll")
    rows = []
    for model, values in table.iterrows():
        cells = {f"{v:g}": f"{nll:.4f}" for v, nll in values.items()}
        best = f"{values.idxmin():g}"
        rows.append({"network": tex(short(model))} | cells | {best: f"\\textbf{{{cells[best]}}}"})
    return pd.DataFrame(rows)


def best_swept(study: Study, plain: pd.DataFrame) -> dict[str, float]:
    """The value of the swept parameter with the lowest mean validation NLL, by model."""
    (swept,) = study.sweep
    return plain.pivot_table(index="student", columns=swept, values="valid_nll").idxmin(axis=1).to_dict()


def method_means(distilled: pd.DataFrame) -> pd.DataFrame:
    """Mean validation accuracy and NLL of every method and its arguments over all pairs and seeds, best first."""
    means = distilled.groupby(["method", "method_args"])[["valid_top1", "valid_nll"]].mean().reset_index()
    return means.sort_values(["valid_top1", "valid_nll"], ascending=[False, True], ignore_index=True)


def method_table(distilled: pd.DataFrame) -> pd.DataFrame:
    """`method_means` as it is printed."""
    means = method_means(distilled)
    return pd.DataFrame({
        "method": means.method.map(tex),
        "arguments": means.method_args.map(tex),
        "validation accuracy (\\%)": means.valid_top1.map(lambda v: f"{100 * v:.2f}"),
        "validation NLL": means.valid_nll.map("{:.4f}".format),
    })  # fmt: skip


def tuning_sentence(study: Study, distilled: pd.DataFrame) -> str:
    """What was chosen, and by what."""
    swept = ", ".join(tex(name) for name in study.sweep)
    said = f"For every network the value of {swept} with the lowest mean validation NLL was taken"
    if distilled.empty:
        return said + "."
    best = method_means(distilled).iloc[0]
    return (
        f"{said}; for method {tex(best.method)}, trained at those values, the arguments with the highest mean validation "
        f"accuracy over all pairs: {tex(best.method_args)}."
    )


def method_gains(distilled: pd.DataFrame) -> pd.DataFrame:
    """One row a method and pair of families: the gain's mean and interval, methods in the order of their average gain."""
    rows = []
    for (method, pair, teacher, student), cell in distilled.groupby(["method", "pair", "teacher", "student"]):
        e = cell_gain(cell)
        rows.append({"method": method, "pair": pair, "teacher": teacher, "student": student, "mean": e.mean, "low": e.low,
                     "high": e.high, "estimate": e, "training_s": cell.training_s.median()})  # fmt: skip
    table = pd.DataFrame(rows)
    order = table.groupby("method")["mean"].mean().sort_values(ascending=False).index
    return table.sort_values(["method", "pair"], key=lambda c: c.map(order.get_loc) if c.name == "method" else c)


def methods_table(distilled: pd.DataFrame) -> pd.DataFrame:
    """`method_gains` as it is printed, with the median training time relative to the fastest method's on the same pair."""
    gains = method_gains(distilled)
    fastest = gains.groupby(["teacher", "student"]).training_s.transform("min")
    return pd.DataFrame({
        "method": gains.method.map(tex),
        "teacher": gains.teacher.map(short).map(tex),
        "student": gains.student.map(short).map(tex),
        "gain, points [95\\,\\%]": gains.estimate.map(interval),
        "training (s)": gains.training_s.map("{:.1f}".format),
        "to the fastest": (gains.training_s / fastest).map("{:.2f}".format),
    })  # fmt: skip


def methods_sentence(distilled: pd.DataFrame) -> str:
    """How many methods gain, lose or leave it open, and which leads; no correction for choosing the best of many."""
    by_method = {m: family_gain(runs) for m, runs in distilled.groupby("method")}
    up, down = ([m for m, e in by_method.items() if e.verdict == v] for v in ("raises", "lowers"))
    best = max(by_method, key=lambda m: by_method[m].mean)
    pairs = distilled.groupby(["teacher", "student"]).ngroups
    return (
        f"Of {len(by_method)} methods, averaged over {pairs} pairs, {len(up)} raise the student's accuracy beyond their own "
        f"95\\,\\% interval ({_list(up)}) and {len(down)} lower it ({_list(down)}). The largest mean gain is that of "
        f"{tex(best)}, {interval(by_method[best])} points; being the largest of {len(by_method)}, it flatters. The intervals "
        "are not corrected for the number of methods."
    )


def _list(names: list[str]) -> str:
    return ", ".join(tex(name) for name in names) or "none"
