"""docs/robustness.md: what `make stress` measured, faults injected into a small study and studies of up to 10,000 runs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

PAGE = Path("docs/robustness.md")
RESULTS = Path("benchmarks/results/robustness")
TIMED = ("plan", "dry run, nothing done", "dry run, all done", "analysis")

TEXT = """\
# Nothing lost on the way

Written by `make stress` (`python -m kdfast.report.robustness`) from `benchmarks/results/robustness/`.

## Faults

A small study (8 runs: teacher, baseline, and two methods, for two seeds) is disturbed by chance and called again until it is
finished. Its records are then compared with those of an undisturbed study: everything but times, the hashes of the weights
included, must be equal, and `make doctor` must find nothing damaged.

{faults}

{machine}. The suite injects a few of each (`test_failures.py`); there also: out of memory, two `make reproduce` in one
checkout, two checkouts that share cached teacher outputs and decoded images. Damaged records, checkpoints, cached teacher
outputs and images are in `test_doctor.py`, `test_checkpoint.py`, `test_cache.py` and `test_bad_inputs.py`, with names that are
commands and archives that would leave their folder; a killed Snakemake on a cluster is in `tests/study/test_slurm.py`.

## Many runs

What a study takes beside its runs: planning it, Snakemake's dry run before and after, and the analysis of its records (made up:
those of released runs under new names). Seconds and the highest memory of each process.

{scale}

{scale_machine}. Ten runs a seed, four files a run. {growth}
"""


def page(results: Path = RESULTS) -> str:
    """The page, from the results in a folder."""
    stress, scale = (json.loads((results / f"{name}.json").read_text()) for name in ("stress", "scale"))
    return TEXT.format(
        faults=_faults(stress), machine=_machine(stress["hardware"]), scale=_scale(scale["rows"]),
        scale_machine=_machine(scale["hardware"]), growth=_growth(scale["rows"]),
    )  # fmt: skip


def _growth(rows: list[dict[str, Any]]) -> str:
    """How the last two sizes compare."""
    small, large = rows[-2:]
    times = "; ".join(f"{name}: {large[name]['seconds'] / small[name]['seconds']:.1f}" for name in TIMED)
    return (
        f"With {large['runs'] / small['runs']:.0f} times as many runs, times as long ({times}; "
        f"a write to the cache: {large['ms to write one'] / small['ms to write one']:.1f})."
    )


def _machine(hardware: dict[str, Any]) -> str:
    return f"{hardware['processor']}, {hardware['cores']} cores"


def _faults(found: dict[str, Any]) -> str:
    kills = found["kills"]
    who = ", ".join(f"{name} {n}" for name, n in kills["kills"].items())
    rows = {
        "`kill -9` at random moments": f"{sum(kills['kills'].values())} ({who})",
        "studies finished by calling again": f"{kills['studies']} of {kills['studies']}"
        if kills["finished by one more command"]
        else "not all",
        "runs that went on from a checkpoint": kills["runs gone on from a checkpoint"],
        "processes that outlived their study": kills["processes left"],
        "records lost or changed by kills": len(kills["records lost or changed"]),
    }
    if disk := found.get("disk full"):
        rows |= {
            "full disks (20 to 300 kB for `runs/`)": disk["disks"],
            "of these, said so in a sentence": disk["said so in words"],
            "records lost or changed by full disks": len(disk["records lost or changed"]),
        }
    return pd.DataFrame({"what": list(rows), "measured": list(rows.values())}).to_markdown(index=False, disable_numparse=True)


def _scale(rows: list[dict[str, Any]]) -> str:
    def both(measured: dict[str, float]) -> str:
        return f"{measured['seconds']:.1f} s, {measured['MB']:,} MB"

    return pd.DataFrame(
        {
            "runs": f"{row['runs']:,}",
            **{name: both(row[name]) for name in TIMED},
            "files": f"{row['files']:,}",
            "records and predictions": f"{row['MB of records and predictions']:.0f} MB",
            "entries of the cache": f"{row['entries of the cache']:,}",
            "to write one": f"{row['ms to write one']:.1f} ms",
        }
        for row in rows
    ).to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    PAGE.write_text(page())
