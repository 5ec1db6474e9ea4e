"""Rerunning a released run: equal here, within the seeds' spread elsewhere, and what is said when it is neither."""

import numpy as np
import pytest
from conftest import finish
from scipy import stats

from kdfast.core.errors import KdfastError
from kdfast.core.records import write_record
from kdfast.experiment.runner import Experiment
from kdfast.study import verify as module
from kdfast.study.verify import prediction_interval, verify


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study `tiny` released from runs made here: two seeds of a teacher and of its student."""
    records = {}
    for seed in (0, 1):
        teacher = finish(Experiment({"student": "mini_resnet_s", "epochs": 1, "seed": seed}, tmp_path / "first"))
        student = {"student": "mini_resnet_xs", "epochs": 1, "seed": seed, "teacher": teacher.id, "method": "kd"}
        for record in (teacher, finish(Experiment(student, tmp_path / "first"))):
            records[record.id] = record
            write_record(record, tmp_path / "results" / "tiny" / f"{record.id}.json")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "released", lambda: ["tiny"])
    monkeypatch.setattr(module, "RUNS", tmp_path / "elsewhere")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "again")
    return records


def distilled(records):
    return next(record for record in records.values() if record.teacher)


def change(tmp_path, record, **changes):
    write_record(record.model_copy(update=changes), tmp_path / "results" / "tiny" / f"{record.id}.json")


def test_a_rerun_on_the_same_machine_is_equal_with_its_teacher_trained_first(study, tmp_path, capsys):
    record = distilled(study)
    assert verify("tiny", record.id).words.startswith("equal: the same weights, bit for bit")
    said = capsys.readouterr().out
    assert record.teacher["run"] in said and "about " in said
    assert len(list((tmp_path / "again" / "digits").iterdir())) == 2


def test_a_teacher_that_is_here_is_not_trained_again(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "RUNS", tmp_path / "first")
    record = distilled(study)
    assert verify("tiny", record.id).ok
    assert record.teacher["run"] not in capsys.readouterr().out


def test_an_edited_result_is_found_out(study, tmp_path):
    record = distilled(study)
    change(tmp_path, record, model=record.model | {"weights_sha256": "0" * 64})
    assert not verify("tiny", record.id).ok


@pytest.mark.parametrize(("released", "ok", "said"), [(None, True, "inside"), (0.9999, False, "OUTSIDE")])
def test_on_another_processor_the_prediction_interval_of_the_seeds_decides(study, tmp_path, released, ok, said):
    for record in study.values():
        if record.teacher:
            last = record.last | {"test": record.last["test"] | ({"top1": released} if released else {})}
            other = record.hardware | {"processor": "another"}
            change(tmp_path, record, last=last, hardware=other, model=record.model | {"weights_sha256": "0" * 64})
    verdict = verify("tiny", distilled(study).id)
    assert verdict.ok == ok and said in verdict.words and "2 released seeds" in verdict.words


def test_unknown_studies_and_runs_are_named(study):
    with pytest.raises(KdfastError, match="unknown released study 'tinny'"):
        verify("tinny")
    with pytest.raises(KdfastError, match="unknown run 'x'"):
        verify("tiny", "x")


def test_a_prediction_interval_holds_one_more_value_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = []
    for draws in rng.normal(size=(4000, 6)):
        low, high = prediction_interval(draws[:5])
        hits.append(low <= draws[5] <= high)
    assert stats.binomtest(sum(hits), len(hits), 0.95).pvalue > 0.001
    assert prediction_interval(np.array([1.0])) == (-np.inf, np.inf)


def test_every_rerun_is_noted_beside_the_records_and_status_tells_of_the_last(study, tmp_path):
    record = distilled(study)
    assert "not verified since" in module.standing("tiny")
    verify("tiny", record.id)
    verify("tiny", record.id)
    entries = module.verifications(tmp_path / "results" / "tiny")
    assert [(e.run, e.outcome, e.released) for e in entries] == 2 * [(record.id, "equal", record.model["weights_sha256"])]
    assert "2 made again (2 equal), last on" in module.standing("tiny") and "(the present code)" in module.standing("tiny")
    assert len(module.choose("tiny")[1]) == len(study)


def test_a_damaged_note_of_verifications_is_named(study, tmp_path):
    (tmp_path / "results" / "tiny" / "verified.json").write_text("[{")
    with pytest.raises(KdfastError, match=r"verified.json is damaged"):
        module.standing("tiny")
