"""Published results beside ours: `experiments/published.yaml` against the records of the same study. TeX source."""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import Field

from kdfast.core.config import Strict, validated
from kdfast.report.figures import short
from kdfast.report.latex import interval, load, tex
from kdfast.stats.paired import Estimate, estimate
from kdfast.study.plan import study_named

PUBLISHED = Path("experiments/published.yaml")


class Published(Strict):
    """What is published of one study: test top-1 in %."""

    source: dict[str, str]  # of each column: where it is from, which epoch
    differences: str  # of our protocol
    pairs: dict[str, dict[str, float]] = Field(min_length=1)  # "<teacher> <student>" -> teacher, baseline or a method -> value


def read_published(path: Path = PUBLISHED) -> dict[str, Published]:
    """The file's studies by name; what is wrong with it is said in a KdfastError."""
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return {study: validated(Published, values, f"{path}, {study}") for study, values in content.items()}


def ours(runs: pd.DataFrame, teacher: str, student: str, what: str) -> pd.Series | None:
    """Our test top-1 in %, one value a seed, of what was published under that name; None if it was not run."""
    baselines, taught = runs[runs.teacher.isna()], runs[runs.teacher.notna()]
    if what in ("teacher", "baseline"):
        cell = baselines[baselines.student == (teacher if what == "teacher" else student)]
    else:
        cell = taught[(taught.teacher == teacher) & (taught.student == student) & (taught.method == what)]
    return 100 * cell.set_index("seed").test_top1 if len(cell) else None


def _key(pair: str, what: str) -> tuple[str, str]:
    """A baseline counts once, in however many pairs it is."""
    teacher, student = pair.split()
    return ("baseline", teacher) if what == "teacher" else ("baseline", student) if what == "baseline" else (what, pair)


def comparison(published: Published, runs: pd.DataFrame) -> pd.DataFrame:
    """One row a published number that has a counterpart among our runs: both, and the difference with its interval over seeds."""
    rows, seen = [], set()
    for pair, values in published.pairs.items():
        teacher, student = pair.split()
        for what, value in values.items():
            key = _key(pair, what)
            found = ours(runs, teacher, student, what)
            if found is None or key in seen:
                continue
            seen.add(key)
            name = {"teacher": teacher, "baseline": student}.get(what)
            rows.append({
                "what": name or f"{what}: {teacher} to {student}",
                "label": tex(short(name)) if name else f"{tex(what)}: {tex(short(teacher))} $\\to$ {tex(short(student))}",
                "published": value,
                "reproduced": found.mean(),
                "difference": estimate(found.to_numpy() - value),
                "seeds": len(found),
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["what", "label", "published", "reproduced", "difference", "seeds"])


def printed(compared: pd.DataFrame) -> pd.DataFrame:
    """`comparison` as a table."""
    return pd.DataFrame({
        "what": compared.label,
        "published": compared.published.map("{:.2f}".format),
        "reproduced": compared.reproduced.map("{:.2f}".format),
        "difference [95\\,\\%]": compared.difference.map(interval),
        "seeds": compared.seeds,
    })  # fmt: skip


def run_table(names: list[str], done: list[str]) -> pd.DataFrame:
    """One row a study: how many runs it has, and which commit made them where in what time, or that we did not run it."""
    rows = []
    for name in names:
        study = study_named(name)
        row = {"study": tex(name), "runs": len(study.runs()), "seeds": len(study.seeds)}
        made = _made(name) if name in done else {"run by": "", "on": "configured, not run by us", "hours": ""}
        rows.append(row | {key: tex(value) for key, value in made.items()})
    return pd.DataFrame(rows)


def _made(study: str) -> dict[str, str]:
    """The newest run's commit (the code's hash where it was made outside a repository), processors, and hours of run time."""
    _, records, runs = load(study, "released")
    newest = max(records, key=lambda r: r.time["started"])
    commit, processors = newest.code["commit"], sorted({_short(r.hardware["processor"]) for r in records})
    return {
        "run by": f"commit {commit[:10]}" if commit else f"code {newest.code['hash'][:10]}",
        "on": f"{' and '.join(processors)}, {newest.hardware['cores']} cores",
        "hours": f"{runs.total_s.sum() / 3600:.2f}",
    }


def _short(processor: str) -> str:
    return processor.replace("(R)", "").removesuffix(" Processor")


def data_table(done: list[str]) -> pd.DataFrame:
    """One row a data set of the studies that were run: classes, pixels, images of each part, where it was found, fingerprint."""
    rows = {}
    for name in done:
        data = load(name, "released")[1][0].data
        parts = " / ".join(f"{data['counts'][part]:,d}" for part in ("train", "valid", "test"))
        rows[data["fingerprint"]] = {
            "data set": tex(data["name"]), "classes": len(data["classes"]), "pixels": data["image_size"],
            "train / valid / test": parts, "found as": tex(data.get("source") or "--"), "fingerprint": tex(data["fingerprint"]),
        }  # fmt: skip
    return pd.DataFrame(rows.values())


def verdict(difference: Estimate) -> str:
    """`below` or `above` where the interval leaves zero out, else `open`."""
    return {"raises": "above", "lowers": "below"}.get(difference.verdict, "open")


def sentence(study: str, published: Published, runs: pd.DataFrame | None) -> str:
    """How many published numbers have a counterpart of ours, how many of them differ, and by what the protocols do."""
    n = len({key for pair, values in published.pairs.items() for key in (_key(pair, what) for what in values)})
    if runs is None:
        return f"{tex(study)}: {n} published numbers of {len(published.pairs)} pairs; configured, not run by us."
    compared = comparison(published, runs)
    verdicts = compared.difference.map(verdict)
    sources = "; ".join(f"{tex(what)} from {tex(where)}" for what, where in published.source.items())
    known = compared.difference.map(lambda e: e.n > 1)
    above, below, within = (int((known & (verdicts == v)).sum()) for v in ("below", "above", "open"))
    unknown = f", {(~known).sum()} with one seed and no interval" if not known.all() else ""
    return (
        f"{tex(study)}: of {len(compared)} published numbers that were run, {above} lie above our 95\\,\\% interval (we fall "
        f"short), {below} below it, {within} within{unknown}. Sources: {sources}. "
        f"Differences of protocol: {tex(published.differences)}."
    )
