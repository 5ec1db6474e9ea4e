"""What inference costs, in tables, sentences and figures, on made-up measurements with a known truth."""

import json

import numpy as np
import pandas as pd
import pytest

from kdfast.report import costs, diagrams
from kdfast.study import measuring


def measurement(factor: float) -> dict:
    """A network that costs so many times what a unit network does."""
    speed = {"latency_s": {"median": 0.001 * factor, "p95": 0.002 * factor}, "throughput": {"images_per_s": 1000 / factor}}
    return {
        "flops": 1e6 * factor, "bytes": {"torch": 1e6 * factor, "onnx": 1e6 * factor, "int8": 0.25e6 * factor},
        "peak_bytes": {"inference": 2e6 * factor, "training": 8e6 * factor},
        "speed": [{"runtime": kind, "threads": 1, "device": "cpu"} | speed for kind in ("torch", "onnx", "int8")],
        "settings": {"warm_up": 3, "repeats": 20, "min_run_time": 0.2}, "hardware": {"processor": "a CPU"},
        "packages": {"torch": "2", "onnxruntime": "1"},
    }  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A student, two teachers of 4 and 10 times its cost, and a network that was not measured."""
    monkeypatch.setattr(measuring, "EFFICIENCY", tmp_path)
    monkeypatch.setattr(costs, "EFFICIENCY", tmp_path)
    for name, factor in {"mini_a": 1, "big": 4, "bigger": 10}.items():
        path = measuring.result_path(name, 8, 10)
        path.write_text(json.dumps(measurement(factor)))
    return costs.read_efficiency(["mini_a", "big", "bigger", "absent"], 8, 10)


BASELINE = pd.DataFrame({"student": ["mini_a", "big", "bigger"], "family": ["x", "x", "y"], "test_top1": [0.7, 0.9, 0.8]})
PAIRS = pd.DataFrame({"student": ["mini_a", "mini_a"], "teacher": ["big", "bigger"]})


def test_what_students_save_is_said_as_a_range_over_pairs(measured):
    said = costs.efficiency_sentence(costs.inference_table(BASELINE, measured), PAIRS)
    assert "latency at batch 1 4.0 to 10.0 times" in said and "size on disk 4.0 to 10.0 times" in said


def test_what_was_not_measured_is_shown_as_not_measured(measured):
    table = costs.efficiency_table(["mini_a", "absent"], measured).set_index("network")
    assert set(table.loc["absent"]) == {"--"} and table.loc["a", "MFLOP"] == "1.0"
    assert "not measured" in costs.efficiency_sentence(costs.inference_table(BASELINE, {}), PAIRS)
    assert costs.machine({}) == "not measured" and "at least 20 blocks" in costs.machine(measured)


def test_the_pareto_front_leaves_out_what_is_slower_and_worse(measured):
    figure = diagrams.pareto(costs.inference_table(BASELINE, measured), ["mini_a"])
    front = figure.axes[0].lines[0].get_xydata()
    assert np.allclose(front, [[1.0, 70.0], [4.0, 90.0]])


class Record:
    def __init__(self, weights):
        self.model = {"weights_sha256": weights}


def test_int8_is_said_with_its_loss_of_accuracy_of_the_records_own_students(measured, tmp_path):
    row = {"run": "r", "student": "mini_a", "teacher": None, "difference": 2e-6, "onnx_bytes": 4e6, "int8_bytes": 1e6}
    rows = [
        row | {"weights": w, "accuracy": {"torch": 0.9, "onnx": 0.9, "int8": int8}} for w, int8 in (("x", 0.88), ("y", 0.905))
    ]
    (tmp_path / "exported-s.json").write_text(json.dumps(rows))
    found = costs.read_exported("s", [Record("x"), Record("y")])
    said = costs.exported_sentence(found)
    assert "4.0 to 4.0 times smaller" in said and "$-2.00$ to $+0.50$ points" in said and "$2.0\\cdot 10^{-6}$" in said
    assert list(costs.exported_table(found).int8) == ["88.00", "90.50"]
    assert len(costs.read_exported("s", [Record("x")])) == 1 and costs.read_exported("other", [Record("x")]) == []
    assert "No student" in costs.exported_sentence([]) and costs.exported_table([]).empty
