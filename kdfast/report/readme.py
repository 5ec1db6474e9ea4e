"""`python -m kdfast.report.readme`: the generated parts of README.md and docs/, and their figures, from released records and
benchmarks. Each part stands between two marks; a test holds the pages against it.
"""

from pathlib import Path

from kdfast.report import benchmarks, claims, costs, figures, latex, literature
from kdfast.report.latex import interval
from kdfast.stats import paired
from kdfast.stats.comparison import Comparison, compare
from kdfast.stats.intervals import teacher_quality
from kdfast.stats.paired import family_difference, with_both
from kdfast.study.plan import BENCHMARKS, STUDIES, questions, study_named, unreleased
from kdfast.study.plan import released as with_records

MARKS = "<!-- {}: written by python -m kdfast.report.readme -->\n", "<!-- end of {} -->"
SHOWN = "digits"  # the study of the README's figure and table
METHODS = "digits_methods"
UNTOLD = "No released records yet: `make reproduce` makes your own.\n"
NOT_RUN = "configured, not run by us"
VERDICTS = {"raises": "yes, it is above zero", "lowers": "yes, it is below zero", "open": "no, the interval includes zero"}


def plain_text(tex: str) -> str:
    """A sentence of `kdfast.report.claims` without its TeX."""
    return tex.replace("$", "").replace("\\%", "%").replace("\\,", " ").replace("\\_", "_").replace("--", "–")


def complete() -> list[str]:
    """The studies of which every record is released."""
    return [name for name in with_records() if (STUDIES / f"{name}.yaml").is_file() and not unreleased(name)]


def _compared(name: str) -> Comparison:
    study, _, runs = latex.load(name, "released")
    return compare(runs, latex.record_paths(study, name, "released"))


# The README's table


def answer() -> str:
    """The digits study in one small table, as Markdown."""
    if SHOWN not in complete():
        return UNTOLD
    study, records, runs = latex.load(SHOWN, "released")
    machine = records[0].hardware
    said = (
        f"{study.title}: {len(study.teachers)} teachers, {len(study.students)} students, {len(study.seeds)} seeds; "
        f"{len(runs)} runs in {runs.total_s.sum() / 60:.0f} minutes of run time on {machine['processor']}, "
        f"{machine['cores']} cores."
    )
    return f"{said}\n\n{table(_compared(SHOWN), _compared(METHODS) if METHODS in complete() else None)}"


def table(c: Comparison, methods: Comparison | None) -> str:
    """What a study shows, a row for each question; `methods`: of the study of all methods."""
    rows = [*_gains(c), *_teachers(c), *([] if methods is None else _methods(methods)), *_time(c)]
    lines = [
        "| what | measured | 95 % interval | shown? |",
        "|---|---|---|---|",
        *(f"| {plain_text(' | '.join(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _row(what: str, estimate: paired.Estimate, unit: str = " points") -> tuple[str, str, str, str]:
    mean, _, rest = interval(estimate).partition(" [")
    return what, mean + unit, f"[{rest}" if rest else "", VERDICTS[estimate.verdict] if rest else "one seed shows nothing"


def _gains(c: Comparison) -> list[tuple[str, ...]]:
    rows = []
    for family in ("same", "cross"):
        if n := len(c.cells_of(family)):
            rows.append(_row(f"gain of distillation, {n} {family}-architecture pairs", c.average(family)))
    if len(c.distilled) and len(both := with_both(c.distilled)):
        difference = family_difference(both, image_variance=c.images.get("difference", 0.0))
        rows.append(_row("same-architecture minus cross-architecture", difference))
    return rows


def _teachers(c: Comparison) -> list[tuple[str, ...]]:
    quality = teacher_quality(c.distilled)
    what = "rank correlation of teachers' and their students' accuracy"
    return [] if quality is None else [_row(f"{what}, {quality.teachers} teachers", quality.rho, "")]


def _methods(c: Comparison) -> list[tuple[str, ...]]:
    """How many were shown to gain or lose, averaged over their pairs."""
    gains = c.distilled.groupby(["method", "seed"]).gain.mean().unstack("seed")
    if gains.shape[1] < 2:
        return []
    p = paired.adjusted([paired.estimate(row).p for row in gains.to_numpy()])
    sure = gains.mean(axis=1)[p <= claims.SURE]
    counted = f"{(sure > 0).sum()} gain, {(sure < 0).sum()} lose"
    return [(f"{len(gains)} methods as published, not tuned", counted, "", "corrected for their number (Holm)")]


def _time(c: Comparison) -> list[tuple[str, ...]]:
    baseline = c.baselines.groupby("student").training_s.median()
    ratio = c.distilled.groupby(["student", "teacher"]).training_s.median() / baseline
    span = f"{ratio.min():.2f} to {ratio.max():.2f} over the pairs"
    return [("training time over the baseline's, median pair", f"{ratio.median():.2f}, {span}", "", "")]


# The pages in docs/


def results() -> str:
    """The findings of the released studies that compare, and of digits_methods, as Markdown."""
    there = complete()
    told = [_told(name) for name in there if "all_pairs" in questions(study_named(name))]
    if METHODS in there:
        title = study_named(METHODS).title
        told.append(f"**{title}.** {plain_text(claims.methods_sentence(_compared(METHODS)))}\n")
    return "\n".join(told) or UNTOLD


def _told(name: str) -> str:
    study, records, runs = latex.load(name, "released")
    c, machine = _compared(name), records[0].hardware
    processors = " and ".join(sorted({r.hardware["processor"] for r in records}))
    made = (
        f"**{study.title}.** {len(runs)} runs, {runs.seed.nunique()} seed{'s' * (runs.seed.nunique() > 1)}, "
        f"{runs.total_s.sum() / 60:.0f} minutes of run time on {processors} ({machine['cores']} cores, "
        f"{machine['threads']} thread a run). {study.note}"
    )
    lines = [
        "- **Same architecture.** " + claims.family_sentence(c, "same"),
        "- **Cross architecture.** " + claims.family_sentence(c, "cross"),
        "- **Which family?** " + claims.same_or_cross(c),
        "- **Better teachers?** " + claims.better_teacher(c),
        "- **Students above teachers?** " + claims.beats_teacher(c),
        "- **Power.** " + claims.power(c),
        "- **Cost.** " + costs.cost_sentence(c.distilled, c.baselines),
    ]
    return made.strip() + "\n\n" + plain_text("\n".join([*lines, ""]))


def studies() -> str:
    """What was run of every study, by which commit, where and in what time, as Markdown."""
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    table = literature.run_table(names, complete()).astype(str).map(plain_text)
    retired = [study_named(name).note.startswith("Retired") for name in names]
    table.loc[retired, "on"] = table.loc[retired, "on"].replace(NOT_RUN, "retired: its file says why")
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def measurements() -> str:
    """What the benchmarks measured beside what was asked for, as Markdown."""
    found = benchmarks.load(BENCHMARKS)
    return f"{plain_text(benchmarks.machine(found))}:\n\n{benchmarks.readme(found)}"


# Into the files

PARTS = {
    "README.md": {"answer": answer, "studies": studies},
    "docs/teacher-outputs.md": {"measurements": measurements},
    "docs/evidence.md": {"results": results},
}


def block(name: str, text: str) -> str:
    """A generated part with its marks."""
    return MARKS[0].format(name) + text + MARKS[1].format(name)


def page(path: str) -> str:
    """A page as it should be: what it says now, its generated parts made anew."""
    text = Path(path).read_text()
    for name, make in PARTS[path].items():
        before, begin, rest = text.partition(MARKS[0].format(name))
        _, end, after = rest.partition(MARKS[1].format(name))
        if not (begin and end):
            raise ValueError(f"{path} lacks the marks of {name}")
        text = before + block(name, make()) + after
    return text


def main() -> None:
    for path in PARTS:
        Path(path).write_text(page(path))
    figures.use_paper_style()
    if SHOWN in complete():
        _, _, runs = latex.load(SHOWN, "released")
        figure = figures.teacher_against_student(paired.gains(runs), runs[runs.teacher.isna()])
        figure.savefig("docs/digits.png", dpi=160, metadata={"Software": None})
    figure = figures.growth(benchmarks.load(BENCHMARKS)["amortise"])
    figure.savefig("docs/growth.png", dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
