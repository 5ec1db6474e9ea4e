"""Around Snakemake's SLURM executor: what a killed Snakemake left running, and whether the end of a job can be seen."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from kdfast.core.errors import KdfastError

NAME = "kdfast"  # what the names of our jobs begin with: slurm-jobname-prefix in the profile


def settings_of(folder: Path) -> dict[str, Any]:
    """What a profile says."""
    return yaml.safe_load((folder / "config.yaml").read_text()) or {}


def check_profile(folder: Path) -> None:
    """Refuse a profile with which Snakemake would wait for ever: it asks sacct, which needs an accounting database."""
    settings = settings_of(folder)
    if settings.get("executor") != "slurm":
        return
    if shutil.which("sbatch") is None:
        raise KdfastError(f"profile {folder} wants SLURM, and there is no sbatch here: call this where jobs are submitted")
    if (
        "slurm-status-command" not in settings
        and shutil.which("sacct")
        and subprocess.run(["sacct", "-n"], capture_output=True).returncode
    ):
        raise KdfastError(f"sacct does not answer here: write slurm-status-command: squeue into {folder}/config.yaml")


def leftovers() -> list[str]:
    """The numbers of this checkout's jobs that wait or run. A second Snakemake would submit their runs again."""
    if shutil.which("squeue") is None:
        return []
    asked = subprocess.run(["squeue", "--me", "-h", "-o", "%A %j %Z"], capture_output=True, text=True)
    if asked.returncode:
        why = " ".join(asked.stderr.split())
        raise KdfastError(f"squeue does not say which jobs are left ({why}): call again when it does")
    jobs = [line.split(maxsplit=2) for line in asked.stdout.splitlines()]
    here = Path.cwd().resolve()
    return [job for job, name, folder in jobs if name.startswith(f"{NAME}_") and Path(folder).resolve() == here]


def cancel_leftovers(seconds: float = 120) -> None:
    """End them and wait until they have ended: their runs are submitted anew and go on from their checkpoints."""
    left = leftovers()
    if not left:
        return
    print(f"ending {len(left)} jobs that an earlier call left on the cluster: {', '.join(left)}", file=sys.stderr)
    subprocess.run(["scancel", *left], check=False)
    deadline = time.monotonic() + seconds
    while leftovers():
        if time.monotonic() > deadline:
            raise KdfastError(f"jobs {', '.join(leftovers())} of this checkout did not end within {seconds:.0f} s of scancel")
        time.sleep(1)
