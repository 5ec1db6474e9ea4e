"""What the benchmarks measured (`benchmarks/results/*.json`), as tables and sentences for paper and README. TeX source."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from kdfast.core.errors import KdfastError
from kdfast.report.latex import tex

NAMES = ("step", "memory", "loader", "amortise", "grid", "options", "method_cost")
Results = dict[str, Any]  # name, settings, rows, hardware, packages, code, date


def load(folder: str | Path) -> dict[str, Results]:
    """All results in a folder, by name; a missing or broken file raises a KdfastError."""
    found = {}
    for name in NAMES:
        path = Path(folder) / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise KdfastError(f"no benchmark results in {path} ({type(error).__name__}): run make bench") from None
    return found


def machine(found: dict[str, Results]) -> str:
    """Processor, threads, torch and days of the measurements."""
    first = found["step"]
    days = sorted({results["date"] for results in found.values()})
    return tex(
        f"{first['hardware']['processor']} ({first['hardware']['cores']} cores, one thread a process), "
        f"torch {first['packages']['torch']}, {' to '.join(dict.fromkeys([days[0], days[-1]]))}"
    )


def step_table(step: Results) -> pd.DataFrame:
    """One row a teacher: its steps relative to a step without a teacher, and to fasterai's."""
    rows = pd.DataFrame(step["rows"])
    table = pd.DataFrame({"teacher": rows.teacher.map(tex)})
    for column, heading in {
        "cached / baseline": "cached",
        "live / baseline": "live",
        "fasterai / baseline": "fasterai",
        "live / (baseline + teacher)": "live / floor",
        "live / fasterai": "live / fasterai",
        "cached / fasterai": "cached / fasterai",
    }.items():
        table[heading] = rows[column].map("{:.2f}".format)
    return table


def _span(rows: list[dict], column: str) -> str:
    values = [row[column] for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"


def sentence(found: dict[str, Results]) -> str:
    """What a step costs with each kind of teacher, and what memory."""
    rows, settings = found["step"]["rows"], found["step"]["settings"]
    memory = {row["kind"]: row["/ baseline"] for row in found["memory"]["rows"]}
    sum_of_both = _span(rows, "live / (baseline + teacher)")
    return (
        f"With {tex(settings['student'])} at {settings['size']} pixels and batches of {settings['batch_size']}, a step "
        f"that reads cached logits takes {_span(rows, 'cached / baseline')} times a step without a teacher, over {len(rows)} "
        "teachers; "
        f"with a live teacher it takes {_span(rows, 'live / baseline')} times, which is {sum_of_both} times the sum of the "
        "baseline's step and the teacher's forward; with the callback of fasterai, which keeps the teacher's graph, "
        f"{_span(rows, 'fasterai / baseline')} times. Peak memory in training is {memory['cached']:.2f} times "
        f"that without a teacher with cached logits, {memory['live']:.2f} times with a live one."
    )


def growth_sentence(amortise: Results) -> str:
    """From how many runs on cached teacher outputs pay, and what is left of the teacher's cost at the last point."""
    s, last = amortise["settings"], amortise["rows"][-1]
    live, stored = (last[f"{kind} (s)"] / last["baseline (s)"] for kind in ("live", "cached"))
    return (
        f"A student of {s['epochs']} epochs takes {s['baseline_s']:.2f} s alone and {s['distilled_s']:.2f} s with the method's "
        f"own terms; a live teacher ({tex(s['teacher'])}) adds {s['live_teacher_s']:.2f} s to every run, computing the cached "
        f"outputs {s['cached_teacher_s']:.2f} s to the first. After {last['runs']} runs distillation has cost {live:.2f} times "
        f"what training without a teacher costs with a live teacher, {stored:.2f} times with cached teacher outputs."
    )


def readme(found: dict[str, Results]) -> str:
    """The README's table: what was measured beside what was asked for, misses included."""
    step, grid = found["step"]["rows"], found["grid"]["rows"][0]
    memory = {row["kind"]: row["/ baseline"] for row in found["memory"]["rows"]}
    limits = found["step"]["settings"]["limits"]
    rows = [
        (f"step: {what}, worst of {len(step)} teachers", max(row[what] for row in step), limit) for what, limit in limits.items()
    ]
    rows.append(("peak memory in training, cached / baseline", memory["cached"], found["memory"]["settings"]["limit"]))
    share = max(row["loader / step"] for row in found["loader"]["rows"])
    rows.append(("loader / step, digits and 64-pixel photos", share, found["loader"]["settings"]["limit"]))
    wanted = found["grid"]["settings"]["limits"]
    rows.append((f"{grid['study']} through Snakemake, wall × cores / loops alone", grid["wall × cores / loops"], wanted["grid"]))
    rows.append(("seconds of a run outside training and evaluation", grid["outside a run (s)"], wanted["outside (s)"]))
    lines = ["| what | measured | asked for |", "|---|---|---|"]
    lines += [f"| {what} | {value:.2f}{'' if value <= limit else ' (missed)'} | ≤ {limit} |" for what, value, limit in rows]
    side = (
        f"Runs side by side take {grid['loops side by side / alone']:.2f} times as long as alone, which is in the grid's ratio."
    )
    return "\n".join([*lines, "", side]) + "\n"
