"""`python -m kdfast.report.readme`: the README's results, figures and measurements, from released records and benchmarks.

A test holds the README against them.
"""

from pathlib import Path

from kdfast.report import benchmarks, claims, costs, figures, latex, literature
from kdfast.stats import paired
from kdfast.stats.comparison import compare
from kdfast.study.plan import BENCHMARKS, STUDIES, questions, study_named, unreleased
from kdfast.study.plan import released as with_records

MARKS = "<!-- {}: written by python -m kdfast.report.readme -->\n", "<!-- end of {} -->"


def plain_text(tex: str) -> str:
    """A sentence of `kdfast.report.claims` without its TeX."""
    return tex.replace("$", "").replace("\\%", "%").replace("\\,", " ").replace("\\_", "_").replace("--", "–")


def results() -> str:
    """The findings of the released studies that compare, and of digits_methods, as Markdown."""
    told = [_compared(name) for name in with_records() if "all_pairs" in questions(study_named(name))]
    study, _, runs = latex.load("digits_methods", "released")
    compared = compare(runs, latex.record_paths(study, "digits_methods", "released"))
    return "\n".join([*told, f"**{study.title}.** {plain_text(claims.methods_sentence(compared))}", ""])


def _compared(name: str) -> str:
    study, records, runs = latex.load(name, "released")
    c = compare(runs, latex.record_paths(study, name, "released"))
    machine = records[0].hardware
    processors = " and ".join(sorted({r.hardware["processor"] for r in records}))
    made = (
        f"**{study.title}.** {len(runs)} runs, {runs.seed.nunique()} seed{'s' * (runs.seed.nunique() > 1)}, "
        f"{runs.total_s.sum() / 60:.0f} minutes of run time on {processors} ({machine['cores']} cores, "
        f"{machine['threads']} thread a run), code {runs.code_hash.iloc[0]}. {study.note}"
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
    table = literature.run_table(names, [name for name in with_records() if not unreleased(name)])
    return table.astype(str).map(plain_text).to_markdown(index=False, disable_numparse=True) + "\n"


def measurements() -> str:
    """What the benchmarks measured beside what was asked for, as Markdown."""
    found = benchmarks.load(BENCHMARKS)
    return f"{plain_text(benchmarks.machine(found))}:\n\n{benchmarks.readme(found)}"


def blocks() -> dict[str, str]:
    """What stands between the README's marks, marks included, by name."""
    made = {"studies": studies(), "results": results(), "measurements": measurements()}
    return {name: MARKS[0].format(name) + text + MARKS[1].format(name) for name, text in made.items()}


def main() -> None:
    readme = Path("README.md")
    text = readme.read_text()
    for name, block in blocks().items():
        before, _, rest = text.partition(MARKS[0].format(name))
        text = before + block + rest.partition(MARKS[1].format(name))[2]
    readme.write_text(text)
    figures.use_paper_style()
    _, _, runs = latex.load("digits", "released")
    figure = figures.teacher_against_student(paired.gains(runs), runs[runs.teacher.isna()])
    figure.savefig("docs/digits.png", dpi=160, metadata={"Software": None})
    figure = figures.growth(benchmarks.load(BENCHMARKS)["amortise"])
    figure.savefig("docs/growth.png", dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
