"""`python -m kdfast.readme`: the README's results, figures and measurements, from published records and benchmarks.

A test holds the README against them.
"""

from pathlib import Path

from kdfast import findings, measured, plots, published, report, stats
from kdfast.workflow import BENCHMARKS, STUDIES, unpublished
from kdfast.workflow import published as workflow_published

MARKS = "<!-- {}: written by python -m kdfast.readme -->\n", "<!-- end of {} -->"


def plain_text(tex: str) -> str:
    """A sentence of `kdfast.findings` without its TeX."""
    return tex.replace("$", "").replace("\\%", "%").replace("\\,", " ").replace("\\_", "_")


def results() -> str:
    """The findings of digits as Markdown."""
    _, records, runs = report.load("digits", "published")
    plain, distilled = runs[runs.teacher.isna()], stats.gains(runs)
    methods = stats.gains(report.load("digits_methods", "published")[2])
    lines = [
        "- **Same architecture.** " + findings.family_sentence(distilled[distilled.pair == "same"], "same-architecture"),
        "- **Cross architecture.** " + findings.family_sentence(distilled[distilled.pair == "cross"], "cross-architecture"),
        "- **Which family?** " + findings.same_or_cross(distilled),
        "- **Better teachers?** " + findings.better_teacher(distilled),
        "- **Students above teachers?** " + findings.beats_teacher(distilled),
        "- **Cost.** " + findings.cost_sentence(distilled, plain),
        "- **Methods** (study digits_methods). " + findings.methods_sentence(methods),
    ]
    machine = records[0].hardware
    made = (
        f"Digits, {len(runs)} runs, {runs.seed.nunique()} seeds, {runs.total_s.sum() / 60:.0f} minutes of run time on "
        f"{machine['processor']} ({machine['cores']} cores, {machine['threads']} thread a run), code {runs.code_hash.iloc[0]}:"
    )
    return plain_text("\n".join([made, "", *lines, ""]))


def studies() -> str:
    """What was run of every study, by which commit, where and in what time, as Markdown."""
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    table = published.run_table(names, [name for name in workflow_published() if not unpublished(name)])
    return plain_text(table.to_markdown(index=False, disable_numparse=True)) + "\n"


def measurements() -> str:
    """What the benchmarks measured beside what was asked for, as Markdown."""
    found = measured.load(BENCHMARKS)
    return f"{plain_text(measured.machine(found))}:\n\n{measured.readme(found)}"


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
    plots.use_paper_style()
    _, _, runs = report.load("digits", "published")
    figure = plots.teacher_against_student(stats.gains(runs), runs[runs.teacher.isna()])
    figure.savefig("docs/digits.png", dpi=160, metadata={"Software": None})
    figure = plots.growth(measured.load(BENCHMARKS)["amortise"])
    figure.savefig("docs/growth.png", dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
