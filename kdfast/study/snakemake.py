"""The Snakemake call that does what a study still lacks, and what of it is there."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdfast.core.code import code_of
from kdfast.core.config import Run
from kdfast.core.errors import KdfastError, unknown
from kdfast.core.extras import require
from kdfast.core.records import PREDICTIONS, RECORD, VERIFIED, read_record
from kdfast.kernels import client
from kdfast.study.failures import failure
from kdfast.study.plan import RESULTS, plan, released, study_named
from kdfast.study.progress import run_with_progress
from kdfast.study.resources import estimate_costs
from kdfast.study.slurm import cancel_leftovers, check_profile, settings_of
from kdfast.study.study_file import Study

PROFILES = Path("experiments/profiles")


def fetch_data(studies: Iterable[Study]) -> None:
    """Have the named data sets on this machine before the first run asks for them; a KdfastError says what is to be done."""
    from kdfast.data.datasets import SOURCES, find

    for dataset in {study.dataset for study in studies} & SOURCES.keys():
        print(f"data set {dataset}: {find(dataset)}")


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
    require("paper", "snakemake", "papermill", "nbconvert", "seaborn", "statsmodels")
    if not studies:
        raise KdfastError(f"no study has released records in {RESULTS}: make reproduce, then make release")
    folder = profile_folder(profile) if profile else None
    where = ["--profile", str(folder)] if folder else ["--cores", "all"]
    if records == "runs":
        wanted = [study_named(name) for name in studies]
        if not profile and any(
            not (Path("runs") / run.folder_name / RECORD).is_file() for study in wanted for run in study.runs()
        ):
            client.prepare()  # it imports what the runs need while the names are checked here
        for study in wanted:
            study.check_names()
        fetch_data(wanted)
        for name in studies:
            refuse_other_data(name)
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
    """Each run of a study: done, stale (made by other code), other data (than the data set is now), failed or missing."""
    runs = study_named(study).runs()
    now = {}
    if any((Path("runs") / run.folder_name / RECORD).is_file() for run in runs):
        now = fingerprints(runs)
    return {run: _state(Path("runs") / run.folder_name, run, now.get(_data_of(run))) for run in runs}


def _state(folder: Path, run: Run, fingerprint: str | None) -> str:
    if (folder / RECORD).is_file():
        record = read_record(folder / RECORD)
        if fingerprint is not None and record.data["fingerprint"] != fingerprint:
            return "other data"
        return "done" if record.code["hash"] == code_of(run) else "stale"
    return "failed" if failure(folder / "experiment.ipynb") else "missing"


def _data_of(run: Run) -> tuple:
    return run.dataset, run.image_size, run.valid_pct, run.folds, run.fold


def fingerprints(runs: Iterable[Run]) -> dict[tuple, str]:
    """The fingerprints that the runs' data have now, by data set, size and split; a data set that is not here is left out."""
    from kdfast.data.datasets import load_data  # with torch
    from kdfast.data.splits import HoldOut

    found = {}
    for key in dict.fromkeys(map(_data_of, runs)):
        dataset, size, *split = key
        with suppress(KdfastError):
            found[key] = load_data(dataset, size, HoldOut(*split)).fingerprint
    return found


def refuse_other_data(study: str) -> None:
    """A KdfastError where finished runs were made of other data than the data set is now: a study never mixes the two."""
    other = [run.id for run, state in states(study).items() if state == "other data"]
    if other:
        raise KdfastError(
            f"{len(other)} runs of study {study} ({other[0]} for one) were trained on other images, labels or another split than "
            f"{study_named(study).dataset} has now: make reproduce STUDY={study} RERUN=1 trains them again"
        )


def show_status(study: str) -> None:
    """Print how many runs are in each state and name those that are not done."""
    found = states(study)
    console, table = Console(), Table(title=f"study {study}: {len(found)} runs", title_justify="left")
    table.add_column("state")
    table.add_column("runs", justify="right")
    for state in ("done", "stale", "other data", "failed", "missing"):
        table.add_row(state, str(sum(s == state for s in found.values())))
    console.print(table)
    if study in released():
        from kdfast.study.verify import standing  # with scipy, which jobs need not wait for

        console.print(standing(study), highlight=False, soft_wrap=True)
    for run, state in found.items():
        if state == "failed":
            why = failure(Path("runs") / run.folder_name / "experiment.ipynb")
            console.print(f"failed      {run.id}: {why}", highlight=False, soft_wrap=True)
        elif state != "done":
            console.print(f"{state:11s} {run.id}", highlight=False, soft_wrap=True)
    if {"stale", "other data"} & set(found.values()):
        console.print(f"make reproduce STUDY={study} RERUN=1 retrains the runs that are stale or of other data")


def show_cache(clear: bool = False) -> None:
    """Print the cached teacher outputs, what was used longest ago first; or remove it."""
    from kdfast.distill.cache import Cache, cache_folder

    cache = Cache(cache_folder("runs"))
    if clear:
        print(f"{cache.clear()} entries removed from {cache.folder}")
        return
    found = cache.report()
    table = Table(title=f"{cache.folder}: {found.MB.sum():.1f} MB of at most {cache.limit / 1e6:,.0f}", title_justify="left")
    for column, justify in {"teacher, data, part": "left", "views": "right", "MB": "right", "last used": "left"}.items():
        table.add_column(column, justify=justify)
    for row in found.itertuples():
        table.add_row(row.name, str(row.parts), f"{row.MB:.2f}", f"{row.used:%Y-%m-%d %H:%M}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file has room for whole names


def forget_outdated(study: str) -> int:
    """Remove the records that are stale or of other data, so that their runs are trained again; returns how many."""
    outdated = [run for run, state in states(study).items() if state in ("stale", "other data")]
    for run in outdated:
        (Path("runs") / run.folder_name / RECORD).unlink()
    return len(outdated)


def release(study: str) -> int:
    """Copy the study's records and predictions to experiments/results/<study>/; returns how many came from the user's runs.

    What the user has not run stays as it was released, so that seeds can be added one by one.
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
    if (final / VERIFIED).is_file():  # of runs that are released anew it is told by the hash of their weights
        shutil.copyfile(final / VERIFIED, partial / VERIFIED)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return sum(record.name == RECORD for record, _ in sources.values())


def _source(run: Run, study: str) -> tuple[Path, Path]:
    """Record and predictions of a run: the user's, or those already released."""
    own, old = Path("runs") / run.folder_name, RESULTS / study / f"{run.id}.json"
    if not (own / RECORD).is_file() and old.is_file():
        return old, old.with_suffix(".npz")
    return own / RECORD, own / PREDICTIONS
