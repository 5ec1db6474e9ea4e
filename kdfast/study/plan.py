"""What a study's jobs need and make: paths, parameters, priorities and resources for the Snakefile."""

import json
import math
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from pathlib import Path

from kdfast.core.config import Run
from kdfast.core.errors import KdfastError
from kdfast.core.records import RECORD, record_files
from kdfast.study.resources import LIMIT, SMALL_S, Estimates, Needs, estimate_costs
from kdfast.study.study_file import Study, load_study

STUDIES = Path("experiments/studies")
RESULTS = Path("experiments/results")
BENCHMARKS = Path("benchmarks/results")


def questions(study: Study) -> tuple[str, ...]:
    """The analysis notebooks that a study is put to: by what it varies."""
    if study.sweep:
        return ("tuning",)
    if sum(len(method.each()) for method in study.methods) > 1:
        return ("methods",)
    return (
        "same_architecture", "cross_architecture", "all_pairs", "teacher_quality", "training", "protocol", "calibration", "cost",
        "efficiency",
    )  # fmt: skip


def study_named(name: str) -> Study:
    """The study of experiments/studies/<name>.yaml, given by its name or by that path."""
    if name.endswith((".yaml", ".yml")) and Path(name).resolve().parent == STUDIES.resolve():
        name = Path(name).stem
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise KdfastError(f"a study is named with letters, digits, - and _ (its folders are), not {name!r}: rename its file")
    return load_study(STUDIES / f"{name}.yaml")


def record_path(run: Run, study: str, records: str) -> str:
    """Where the record of a run lies: in its own folder (`runs`) or among the released (`released`)."""
    return f"runs/{run.folder_name}/{RECORD}" if records == "runs" else f"{RESULTS}/{study}/{run.id}.json"


@dataclass
class Plan:
    """Paths and parameters for the Snakefile, which holds the rules alone."""

    studies: dict[str, Study]
    kind: str  # "runs": the user's own records; "released": those in experiments/results
    runs: dict[str, Run]  # by folder name
    asked_by: dict[str, Study] = field(default_factory=dict)  # the study of each run, by folder name

    def teacher_record(self, folder: str) -> list[str]:
        run = self.runs[folder]
        dataset = folder.split("/")[0]
        return [f"runs/{dataset}/{run.teacher}/{RECORD}"] if run.teacher else []

    def papermill_arguments(self, folder: str) -> str:
        """`-p name value` for every parameter that differs from the notebook's default."""
        values = self.runs[folder].model_dump(exclude_defaults=True) | {"explore": False}
        if folder in self.asked_by and self.asked_by[folder].tracker != "none":
            values["tracker"] = self.asked_by[folder].tracker
        as_text = {k: json.dumps(v) if isinstance(v, (dict, list)) else str(v) for k, v in values.items()}
        return " ".join(f"-p {name} {shlex.quote(value)}" for name, value in as_text.items())

    @cached_property
    def estimates(self) -> Estimates:
        """Of all runs; where Snakemake was called by itself, they are made now."""
        if not Estimates().know(self.runs.values()):
            estimate_costs(self.studies.values())
        return Estimates()

    @cached_property
    def needs(self) -> dict[str, Needs]:
        """What each run is estimated to take, by folder name."""
        return {folder: self.estimates.needs(run, self.asked_by[folder]) for folder, run in self.runs.items()}

    def minutes(self, folder: str) -> int:
        """The limit of a run; of one that shares a job little is added, for the shares are."""
        needs = self.needs[folder]
        return needs.minutes if self.group(folder) is None else min(needs.minutes, 2 + math.ceil(LIMIT * needs.seconds / 60))

    def group(self, folder: str) -> str | None:
        """The name that small runs share, by which a cluster may be given several as one job."""
        return "small" if self.needs[folder].seconds <= SMALL_S else None

    @cached_property
    def priorities(self) -> dict[str, int]:
        """Of each run, by folder name: the longest first, a teacher before its longest student; whole numbers from 1."""
        cost = {folder: self.estimates.operations(run) for folder, run in self.runs.items()}
        left = dict(cost)  # a run and the longest that waits for it
        for folder in self.runs:
            for record in self.teacher_record(folder):
                teacher = record.removeprefix("runs/").removesuffix(f"/{RECORD}")
                left[teacher] = max(left.get(teacher, 0), cost.get(teacher, 0) + cost[folder])
        rank = {value: place for place, value in enumerate(sorted(set(left.values())), 1)}
        return {folder: rank[value] for folder, value in left.items()}

    def records(self, study: str, kind: str) -> list[str]:
        return [record_path(run, study, kind) for run in study_named(study).runs()]

    @property
    def numbers(self) -> list[str]:
        """What the paper is made of: each study's questions, and the released tuning behind it."""
        paths = []
        for name, study in self.studies.items():
            paths += [f"build/{self.kind}/{name}/{question}/numbers.tex" for question in questions(study)]
            if study.tuned_by and study.tuned_by in released() and not unreleased(study.tuned_by):
                paths.append(f"build/released/{study.tuned_by}/tuning/numbers.tex")
        if BENCHMARKS.is_dir():
            paths.append(f"build/{self.kind}/benchmarks/teacher_cost/numbers.tex")
        if self.kind == "released":
            paths.append("build/released/literature/literature/numbers.tex")
        return list(dict.fromkeys(paths))

    @property
    def pdf(self) -> str:
        return f"build/{next(iter(self.studies))}/paper.pdf" if self.kind == "runs" else "build/paper.pdf"

    @property
    def targets(self) -> list[str]:
        """The paper, and each run by itself: Snakemake would not miss an input of a finished paper."""
        return [self.pdf, *(f"runs/{folder}/{RECORD}" for folder in self.runs)]

    @property
    def paper_sources(self) -> list[str]:
        return sorted(str(p) for p in Path("paper").rglob("*") if p.suffix in (".tex", ".bib"))

    @property
    def analysis_code(self) -> list[str]:
        rooms = (f"kdfast/{room}/*.py" for room in ("report", "stats"))
        return [*sorted(path for room in rooms for path in glob(room)), "kdfast/core/predictions.py", "kdfast/core/records.py"]

    @property
    def released_records(self) -> list[str]:
        """All of all studies."""
        return [str(path) for folder in sorted(RESULTS.glob("[!.]*")) for path in record_files(folder)]

    @property
    def measured(self) -> list[str]:
        """What `make efficiency` left."""
        return sorted(map(str, (BENCHMARKS / "efficiency").glob("*.json")))

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks' results."""
        return sorted(map(str, BENCHMARKS.glob("*.json")))


def plan(names: list[str], records: str) -> Plan:
    """The jobs of some studies. With released records nothing is trained: a missing record is an error."""
    studies = {name: study_named(name) for name in names}
    runs = {run.folder_name: run for study in studies.values() for run in study.runs()}
    asked_by = {run.folder_name: study for study in studies.values() for run in study.runs()}
    made = Plan(studies, records, runs if records == "runs" else {}, asked_by)
    for name in names if records == "released" else []:
        missing = unreleased(name)
        if missing:
            raise KdfastError(
                f"study {name} has {len(missing)} of its {len(studies[name].runs())} records unreleased, {missing[0]} for "
                f"one: run make reproduce STUDY={name}, then make release STUDY={name}"
            )
    return made


def unreleased(study: str) -> list[str]:
    """Paths of the records that a study asks for and that are not released."""
    paths = [record_path(run, study, "released") for run in study_named(study).runs()]
    return [path for path in paths if not Path(path).is_file()]


def released() -> list[str]:
    """The studies with released records, in the order of their names."""
    return sorted(p.name for p in RESULTS.glob("[!.]*") if record_files(p))
