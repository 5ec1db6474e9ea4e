"""What a study cost, as tables and sentences. TeX source."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from kdfast.core.records import Record
from kdfast.report.figures import short
from kdfast.report.latex import tex
from kdfast.study.measuring import EFFICIENCY, result_path


def cost_table(distilled: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """Sizes and training times of every pair; times are medians over seeds, in seconds, the teacher's part a share of all."""
    baseline = baselines.groupby("student").training_s.median()
    rows = [
        {
            "student": tex(short(student)),
            "teacher": tex(short(teacher)),
            "times smaller": f"{cell.teacher_parameters.iloc[0] / cell.parameters.iloc[0]:.1f}",
            "baseline (s)": f"{baseline[student]:.1f}",
            "distilled (s)": f"{cell.training_s.median():.1f}",
            "ratio": f"{cell.training_s.median() / baseline[student]:.2f}",
            "teacher's part (\\%)": f"{100 * cell.teacher_s.sum() / cell.training_s.sum():.1f}",
        }
        for (student, teacher), cell in distilled.groupby(["student", "teacher"])
    ]
    return pd.DataFrame(rows)


def cost_sentence(distilled: pd.DataFrame, baselines: pd.DataFrame) -> str:
    """The range of the training-time ratios, the teacher's part, and what training the teachers cost beside it."""
    if distilled.empty:
        return "This study distils nothing, so there is no cost to compare."
    baseline = baselines.groupby("student").training_s.median()
    ratio = distilled.groupby(["student", "teacher"]).training_s.median() / baseline
    teachers = baselines[baselines.student.isin(distilled.teacher)].groupby("student").training_s.median()
    own = baseline[distilled.student.unique()]
    live = (distilled.teacher_outputs == "live").sum()
    source = "a live teacher" if live == len(distilled) else "cached teacher outputs"
    mixed = f" (a live teacher in {live} of {len(distilled)} runs)" if 0 < live < len(distilled) else ""
    return (
        f"Training with {source}{mixed} took {ratio.min():.2f} to {ratio.max():.2f} times as long as training its "
        f"baseline (median over seeds), {ratio.median():.2f} times in the median pair. Asking the teachers was "
        f"{100 * distilled.teacher_s.sum() / distilled.training_s.sum():.1f}\\,\\% of the distilled runs' training time. "
        "The teacher has to be trained first, "
        f"which took {teachers.min():.1f} to {teachers.max():.1f} seconds against {own.min():.1f} "
        f"to {own.max():.1f} for a baseline. Several runs shared the machine, so that "
        "seconds are indicative and only ratios are compared. Inference is unchanged by distillation: what a student saves "
        "is its size against the teacher's."
    )


# Inference


def read_efficiency(names: Iterable[str], image_size: int, classes: int) -> dict[str, dict[str, Any]]:
    """The measurements of these networks that are there (`kdfast.study.measuring`), by name."""
    paths = {name: result_path(name, image_size, classes) for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def speed(measured: dict[str, Any], runtime: str = "torch", threads: int = 1) -> dict[str, Any] | None:
    """A network's row of speed on the CPU; None where it was not measured."""
    found = (r for r in measured["speed"] if r["runtime"] == runtime and r["threads"] == threads and r["device"] == "cpu")
    return next(found, None)


def _ms(measured: dict[str, Any], runtime: str) -> str:
    row = speed(measured, runtime)
    return "--" if row is None else f"{1e3 * row['latency_s']['median']:.2f}"


def efficiency_table(names: Iterable[str], measured: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a network, -- where it was not measured: MFLOP, MB (torch, int8), MB of memory, ms at batch 1, images a second."""
    columns = [
        "network",
        "MFLOP",
        "file (MB)",
        "int8 (MB)",
        "memory, inference",
        "training",
        "ms (p95)",
        "onnx",
        "int8",
        "images/s",
    ]
    rows = []
    for name in names:
        found = measured.get(name)
        if found is None:
            rows.append([tex(short(name)), *["--"] * (len(columns) - 1)])
            continue
        latency, peak = speed(found)["latency_s"], found["peak_bytes"]
        rows.append([
            tex(short(name)), f"{found['flops'] / 1e6:,.1f}", _mb(found["bytes"]["torch"]), _mb(found["bytes"].get("int8")),
            _mb(peak.get("inference")), _mb(peak.get("training")),
            f"{1e3 * latency['median']:.2f} ({1e3 * latency['p95']:.2f})",
            _ms(found, "onnx"), _ms(found, "int8"),
            f"{speed(found)['throughput']['images_per_s']:,.0f}",
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _mb(size: float | None) -> str:
    return "--" if size is None else f"{size / 1e6:,.2f}"


def inference_table(baselines: pd.DataFrame, measured: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a measured network: `top1` as baseline (seeds' mean), `latency_ms`, `memory_mb`, `size_mb`, `family`; numbers."""
    rows = []
    for name, found in measured.items():
        runs = baselines[baselines.student == name]
        memory = found["peak_bytes"].get("inference")
        rows.append({
            "network": name, "family": runs.family.iloc[0], "top1": 100 * runs.test_top1.mean(),
            "latency_ms": 1e3 * speed(found)["latency_s"]["median"], "size_mb": found["bytes"]["torch"] / 1e6,
            "memory_mb": float("nan") if memory is None else memory / 1e6,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["network", "family", "top1", "latency_ms", "size_mb", "memory_mb"])


def efficiency_sentence(table: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """What the students save against their teachers; `pairs`: student and teacher of each measured pair."""
    by_name = table.set_index("network")
    pairs = pairs[pairs.student.isin(by_name.index) & pairs.teacher.isin(by_name.index)]
    if pairs.empty:
        return "Inference was not measured for a student and a teacher of this study (make efficiency does)."
    said = []
    names = {"latency_ms": "latency at batch 1", "memory_mb": "peak memory at inference", "size_mb": "size on disk"}
    for column, what in names.items():
        ratio = by_name[column].reindex(pairs.teacher).to_numpy() / by_name[column].reindex(pairs.student).to_numpy()
        if np.isfinite(ratio).all():
            said.append(f"{what} {ratio.min():.1f} to {ratio.max():.1f} times")
    return f"Teachers against their students, by pair: {', '.join(said)} the student's (CPU, one thread, torch)."


def read_exported(study: str, records: Iterable[Record]) -> list[dict[str, Any]]:
    """What `make efficiency` said of the exported students, of those whose weights are among these records."""
    path = EFFICIENCY / f"exported-{study}.json"
    weights = {record.model["weights_sha256"] for record in records}
    return [row for row in json.loads(path.read_text()) if row["weights"] in weights] if path.is_file() else []


def exported_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row an exported student: test accuracy in % in torch, ONNX and int8, and the files' sizes; may be empty."""
    return pd.DataFrame([
        {
            "student": tex(short(row["student"])),
            "taught by": tex(short(row["teacher"])) if row["teacher"] else "--",
            **{kind: f"{100 * row['accuracy'][kind]:.2f}" for kind in ("torch", "onnx", "int8")},
            "largest difference": _power(row["difference"]),
            "onnx (MB)": _mb(row["onnx_bytes"]),
            "int8 (MB)": _mb(row["int8_bytes"]),
        }
        for row in rows
    ])  # fmt: skip


def _power(value: float) -> str:
    """`2.1e-06` as TeX writes it."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"${digits}\\cdot 10^{{{int(exponent)}}}$"


def exported_sentence(rows: list[dict[str, Any]]) -> str:
    """What int8 costs in accuracy."""
    if not rows:
        return "No student of this study was exported."
    loss = [100 * (row["accuracy"]["int8"] - row["accuracy"]["torch"]) for row in rows]
    worst = max(row["difference"] for row in rows)
    smaller = [row["onnx_bytes"] / row["int8_bytes"] for row in rows]
    return (
        f"Exported as ONNX, the students' logits differ by at most {_power(worst)} from torch's; in int8 their files are "
        f"{min(smaller):.1f} to {max(smaller):.1f} times smaller and their accuracy changes by ${min(loss):+.2f}$ to "
        f"${max(loss):+.2f}$ points."
    )


def machine(measured: dict[str, dict[str, Any]]) -> str:
    """Processor, versions, warm-up and repeats of the measurements."""
    if not measured:
        return "not measured"
    first = next(iter(measured.values()))
    s, hardware, versions = first["settings"], first["hardware"], first["packages"]
    return tex(
        f"{hardware['processor']}, torch {versions['torch']}, onnxruntime {versions['onnxruntime']}; {s['warm_up']} calls of "
        f"warm-up, at least {s['repeats']} blocks of calls and {s['min_run_time']:g} s for each latency"
    )
