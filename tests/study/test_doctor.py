"""What make doctor finds, and that it finds nothing where nothing is wrong."""

import json

import pytest
from conftest import ROOT, finish

from kdfast.experiment.runner import Experiment
from kdfast.study import doctor


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Runs with a teacher, its student and cached teacher outputs, and released copies of both."""
    for name in ("KDFAST_CACHE", "KDFAST_DECODED"):
        monkeypatch.setenv(name, str(tmp_path / name))
    teacher = finish(Experiment({"student": "mini_resnet_s", "epochs": 1}, tmp_path / "runs"))
    student = {"student": "mini_resnet_xs", "epochs": 1, "teacher": teacher.id, "method": "kd", "teacher_outputs": "float16"}
    finish(Experiment(student, tmp_path / "runs"))
    for folder in (tmp_path / "runs" / "digits").iterdir():
        (tmp_path / "results" / "s").mkdir(parents=True, exist_ok=True)
        for name, end in {"record.json": "json", "predictions.npz": "npz"}.items():
            (tmp_path / "results" / "s" / f"{folder.name}.{end}").write_bytes((folder / name).read_bytes())
    return tmp_path


def found(place):
    return list(doctor.findings(place / "runs", place / "results"))


def only(place, pattern):
    return next(iter(sorted(place.rglob(pattern))))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))


def better(path):
    record = json.loads(path.read_text())
    record["last"]["test"]["top1"] = 0.99
    path.write_text(json.dumps(record))


def test_nothing_is_found_where_nothing_is_wrong(place):
    assert found(place) == []


@pytest.mark.parametrize(
    ("pattern", "damage", "said"),
    [
        ("runs/*/*/record.json", cut, "not a whole record"),
        ("runs/*/*/record.json", better, "beside a record"),
        ("runs/*/*/weights.safetensors", edit, "not the weights"),
        ("runs/*/*/weights.safetensors", lambda p: p.unlink(), "missing beside its record"),
        ("runs/*/*/predictions.npz", cut, "no whole predictions"),
        ("results/s/*.json", better, "beside a record"),
        ("results/s/*.npz", cut, "no whole predictions"),
        ("KDFAST_CACHE/*/*.safetensors", edit, "changed after they were written"),
        ("runs/*/*/record.json", lambda p: p.with_name(".record.json.7.partial").write_text("{"), "a killed process"),
        ("runs/*/*/record.json", lambda p: p.with_name("checkpoint.pt").write_bytes(b"x" * 99), "a damaged checkpoint"),
    ],
)
def test_what_is_damaged_is_named_with_a_way_out(place, pattern, damage, said):
    path = only(place, pattern)
    damage(path)
    names = [f"{finding.path} {finding.what}" for finding in found(place)]
    assert (
        names and said in names[0] and all(str(path.parent) in name for name in names)
    )  # weights too may tell of an edited record


def test_the_released_records_of_this_repository_are_whole():
    assert not [f for f in doctor.findings(ROOT / "nowhere", ROOT / "experiments" / "results") if "results" in str(f.path)]
