"""The grid: what a study's jobs need and make, what is done, and the Snakemake call that does the rest."""

import fcntl
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdfast import warm
from kdfast.cluster import cancel_leftovers, check_profile, settings_of
from kdfast.errors import KdfastError, unknown
from kdfast.failures import failure
from kdfast.progress import run_with_progress
from kdfast.provenance import code_hash
from kdfast.resources import LIMIT, SMALL_S, Estimates, Needs, estimate_costs
from kdfast.results import PREDICTIONS, RECORD, read_record
from kdfast.study import Run, Study, load_study

STUDIES = Path("experiments/studies")
PROFILES = Path("experiments/profiles")
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
    """The study of experiments/studies/<name>.yaml."""
    return load_study(STUDIES / f"{name}.yaml")


def record_path(run: Run, study: str, records: str) -> str:
    """Where the record of a run lies: in its own folder (`runs`) or among the published (`published`)."""
    return f"runs/{run.folder_name}/{RECORD}" if records == "runs" else f"{RESULTS}/{study}/{run.id}.json"


@dataclass
class Plan:
    """Paths and parameters for the Snakefile, which holds the rules alone."""

    studies: dict[str, Study]
    kind: str  # "runs": the user's own records; "published": those in experiments/results
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
        """What the paper is made of: each study's questions, and the published tuning behind it."""
        paths = []
        for name, study in self.studies.items():
            paths += [f"build/{self.kind}/{name}/{question}/numbers.tex" for question in questions(study)]
            if study.tuned_by and study.tuned_by in published() and not unpublished(study.tuned_by):
                paths.append(f"build/published/{study.tuned_by}/tuning/numbers.tex")
        if BENCHMARKS.is_dir():
            paths.append(f"build/{self.kind}/benchmarks/teacher_cost/numbers.tex")
        if self.kind == "published":
            paths.append("build/published/published/published/numbers.tex")
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
        names = (
            "comparison", "costs", "curves", "diagrams", "findings", "inference", "measured", "measuring", "plots", "predictions",
            "published", "recipe_words", "report", "results", "scrutiny", "stats", "tuning",
        )  # fmt: skip
        return [f"kdfast/{name}.py" for name in names]

    @property
    def published_records(self) -> list[str]:
        """All of all studies."""
        return sorted(map(str, RESULTS.glob("[!.]*/*.json")))

    @property
    def measured(self) -> list[str]:
        """What `make efficiency` left."""
        return sorted(map(str, (BENCHMARKS / "efficiency").glob("*.json")))

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks' results."""
        return sorted(map(str, BENCHMARKS.glob("*.json")))


def fetch_data(studies: Iterable[Study]) -> None:
    """Have the named data sets on this machine before the first run asks for them; a KdfastError says what is to be done."""
    from kdfast.datasets import SOURCES, find

    for dataset in {study.dataset for study in studies} & SOURCES.keys():
        print(f"data set {dataset}: {find(dataset)}")


def plan(names: list[str], records: str) -> Plan:
    """The jobs of some studies. With published records nothing is trained: a missing record is an error."""
    studies = {name: study_named(name) for name in names}
    runs = {run.folder_name: run for study in studies.values() for run in study.runs()}
    asked_by = {run.folder_name: study for study in studies.values() for run in study.runs()}
    made = Plan(studies, records, runs if records == "runs" else {}, asked_by)
    for name in names if records == "published" else []:
        missing = unpublished(name)
        if missing:
            raise KdfastError(
                f"study {name} has {len(missing)} of its {len(studies[name].runs())} records unpublished, {missing[0]} for "
                f"one: run make reproduce STUDY={name}, then make publish STUDY={name}"
            )
    return made


def unpublished(study: str) -> list[str]:
    """Paths of the records that a study asks for and that are not published."""
    paths = [record_path(run, study, "published") for run in study_named(study).runs()]
    return [path for path in paths if not Path(path).is_file()]


def published() -> list[str]:
    """The studies with published records, in the order of their names."""
    return sorted(p.name for p in RESULTS.glob("[!.]*") if any(p.glob("*.json")))


@contextmanager
def alone(wait: bool = True) -> Iterator[None]:
    """Nothing else of this checkout's makes runs meanwhile; the lock goes with the process, however it ends.

    Without `wait`, a KdfastError says that another runs.
    """
    Path("build").mkdir(exist_ok=True)
    with open("build/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise KdfastError("another make or snakemake of this checkout is running: wait for it") from None
            print("waiting for another make in this checkout to finish …", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def claim(cluster: bool) -> ExitStack:
    """For a Snakemake that was called by itself: be alone until what is returned is closed, and end what an earlier one left."""
    held = ExitStack()
    if not os.environ.get("KDFAST_ALONE"):  # else `snakemake` called it, and is
        held.enter_context(alone(wait=False))
        if cluster:
            cancel_leftovers()
    return held


def snakemake(studies: list[str], records: str, extra: list[str], profile: str = "") -> int:
    """Run Snakemake over these studies, with a lock on the checkout; returns its exit code.

    `profile`: the name of a folder in experiments/profiles, or the path of one, that says where the runs go.
    """
    if not studies:
        raise KdfastError(f"no study has published records in {RESULTS}: make reproduce, then make publish")
    folder = profile_folder(profile) if profile else None
    where = ["--profile", str(folder)] if folder else ["--cores", "all"]
    if records == "runs":
        wanted = [study_named(name) for name in studies]
        if not profile and any(
            not (Path("runs") / run.folder_name / RECORD).is_file() for study in wanted for run in study.runs()
        ):
            warm.prepare()  # it imports what the runs need while the names are checked here
        for study in wanted:
            study.check_names()
        fetch_data(wanted)
    planned = plan(studies, records)
    with alone():
        if records == "runs":
            estimate_costs(wanted)
            if folder and settings_of(folder).get("executor") == "slurm" and not {"-n", "--dry-run"} & set(extra):
                cancel_leftovers()
        # --nolock: Snakemake's own lock outlives a kill, ours does not. --ignore-incomplete: what is there is whole, for
        # everything is written atomically, so that a run that was finished when Snakemake was killed is not trained again.
        # --keep-incomplete: nor one that was finished in a cluster's job, of which another run failed in the last attempt.
        command = [
            sys.executable, "-m", "snakemake", "-s", "experiments/Snakefile", *where, "--rerun-triggers", "mtime", "input",
            "--config", f"studies={','.join(studies)}", f"records={records}", *["grouped=yes"] * bool(profile),
            "--nolock", "--keep-going", "--ignore-incomplete", "--keep-incomplete", *extra,
        ]  # fmt: skip
        runs = [Path("runs") / folder / RECORD for folder in planned.runs]
        products = [Path(path) for path in [*planned.numbers, planned.pdf]]
        os.environ["KDFAST_ALONE"] = "yes"  # for `claim`
        return run_with_progress(command, runs, products, Path("build/snakemake.log"))


def profile_folder(profile: str) -> Path:
    """Where a profile's config.yaml lies; a KdfastError if it cannot work here."""
    for folder in (PROFILES / profile, Path(profile)):
        if (folder / "config.yaml").is_file():
            check_profile(folder)
            return folder
    raise unknown("profile", profile, [path.parent.name for path in PROFILES.glob("*/config.yaml")], str(PROFILES))


# What is there


def states(study: str) -> dict[Run, str]:
    """Each run of a study: done, other code (done by other sources or another notebook), failed or missing."""
    current = code_hash()
    return {run: _state(Path("runs") / run.folder_name, current) for run in study_named(study).runs()}


def _state(folder: Path, current: str) -> str:
    if (folder / RECORD).is_file():
        return "done" if read_record(folder / RECORD).code["hash"] == current else "other code"
    return "failed" if failure(folder / "experiment.ipynb") else "missing"


def show_status(study: str) -> None:
    """Print how many runs are in each state and name those that are not done."""
    found = states(study)
    console, table = Console(), Table(title=f"study {study}: {len(found)} runs", title_justify="left")
    table.add_column("state")
    table.add_column("runs", justify="right")
    for state in ("done", "other code", "failed", "missing"):
        table.add_row(state, str(sum(s == state for s in found.values())))
    console.print(table)
    for run, state in found.items():
        if state == "failed":
            why = failure(Path("runs") / run.folder_name / "experiment.ipynb")
            console.print(f"failed      {run.id}: {why}", highlight=False, soft_wrap=True)
        elif state != "done":
            console.print(f"{state:11s} {run.id}", highlight=False, soft_wrap=True)
    if "other code" in found.values():
        console.print(f"make reproduce STUDY={study} RERUN=1 retrains the runs made by other code")


def show_knowledge(clear: bool = False) -> None:
    """Print what is stored of teachers' answers, what was used longest ago first; or remove it."""
    from kdfast.store import Store, store_folder

    store = Store(store_folder("runs"))
    if clear:
        print(f"{store.clear()} entries removed from {store.folder}")
        return
    found = store.report()
    table = Table(title=f"{store.folder}: {found.MB.sum():.1f} MB of at most {store.limit / 1e6:,.0f}", title_justify="left")
    for column, justify in {"teacher, data, part": "left", "views": "right", "MB": "right", "last used": "left"}.items():
        table.add_column(column, justify=justify)
    for row in found.itertuples():
        table.add_row(row.name, str(row.parts), f"{row.MB:.2f}", f"{row.used:%Y-%m-%d %H:%M}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file has room for whole names


def forget_outdated(study: str) -> int:
    """Remove the records made by other code, so that their runs are trained again; returns how many."""
    outdated = [run for run, state in states(study).items() if state == "other code"]
    for run in outdated:
        (Path("runs") / run.folder_name / RECORD).unlink()
    return len(outdated)


def publish(study: str) -> int:
    """Copy the study's records and predictions to experiments/results/<study>/; returns how many came from the user's runs.

    What the user has not run stays as it was published, so that seeds can be added one by one.
    """
    sources = {run.id: _source(run, study) for run in study_named(study).runs()}
    for record, _ in sources.values():
        read_record(record)  # all whole, before anything is replaced
    partial, final = RESULTS / f".{study}.partial", RESULTS / study
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, (record, predictions) in sources.items():
        shutil.copyfile(record, partial / f"{name}.json")
        shutil.copyfile(predictions, partial / f"{name}.npz")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return sum(record.name == RECORD for record, _ in sources.values())


def _source(run: Run, study: str) -> tuple[Path, Path]:
    """Record and predictions of a run: the user's, or those already published."""
    own, old = Path("runs") / run.folder_name, RESULTS / study / f"{run.id}.json"
    if not (own / RECORD).is_file() and old.is_file():
        return old, old.with_suffix(".npz")
    return own / RECORD, own / PREDICTIONS
