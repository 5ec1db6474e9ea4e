"""What trackers promise: the Recorder's numbers come back from their files, the teacher's hash is in all of them, and neither
the weights nor the network notice them."""

import json
import pickle
import random
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from fastai.callback.core import Callback

from kdfast.core.errors import KdfastError
from kdfast.core.records import read_record
from kdfast.experiment.runner import Experiment
from kdfast.training.learner import history
from kdfast.training.trackers import TRACKERS, create_tracker, log_result

LOGGING = [name for name in TRACKERS if name != "none"]


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    """Nobody is logged in; whoever wants to reach another machine is sent to this socket, where nobody answers."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NO_PROXY", "no_proxy"):
            patch.delenv(name, raising=False)
        for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home / name.lower()))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
            patch.setenv(name.lower(), f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def nobody_called(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return True
    return False


def started(name, runs, folder, **parameters):
    """An experiment whose Learner has a tracker, and the tracker's callbacks."""
    experiment = Experiment(parameters, runs)
    experiment.load()
    learn = experiment.learner()
    teacher = None
    if experiment.teacher:
        taught = experiment.teacher.record
        teacher = {"run": taught.id, "model": taught.parameters["student"], **taught.model, "test": taught.last["test"]}
    callbacks = create_tracker(name, experiment.run, folder, teacher)
    learn.add_cbs(callbacks)
    return experiment, callbacks


def train(name, runs, folder):
    """A distilled run with a tracker; MixUp, so that it draws random numbers at every step."""
    distilled = {"student": "mini_resnet_xs", "teacher": "mini_resnet_s", "method": "kd", "mixup": 0.2}
    experiment, callbacks = started(name, runs, folder, epochs=2, **distilled)
    experiment.fit(progress=False)
    drawn = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    record = experiment.finish()
    log_result(callbacks, record)
    return SimpleNamespace(folder=folder, learn=experiment.learn, record=record, drawn=drawn, callbacks=callbacks)


@pytest.fixture(scope="module")
def tracked(runs, tmp_path_factory):
    """One run with each tracker."""
    return {name: train(name, runs, tmp_path_factory.mktemp(name)) for name in TRACKERS}


def read_csv(folder):
    about = json.loads((folder / "tracker.json").read_text())
    curves = pd.read_csv(folder / "history.csv").to_dict("list")
    return SimpleNamespace(curves=curves, teacher=about.get("teacher_weights_sha256"), result=about["result"])


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    text = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    result = {name: scalars.pop(name)[-1] for name in list(scalars) if "test_" in name or name == "best_epoch"}
    result["weights_sha256"] = text["weights_sha256/text_summary"]
    teacher = json.loads(text["teacher/text_summary"]) or {}
    return SimpleNamespace(curves=scalars, result=result, teacher=teacher.get("weights_sha256"))


def wandb_records(folder):
    """What lies in the file of an offline run, from which `wandb sync` uploads."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        yield record


def read_wandb(folder):
    records = list(wandb_records(folder))
    run = next(record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    rows = [{i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in records if r.HasField("history")]
    summary = {(i.key or i.nested_key[0]): json.loads(i.value_json) for r in records for i in r.summary.update}
    curves = pd.DataFrame(rows).drop(columns=["_step", "_timestamp", "_runtime"]).to_dict("list")
    return SimpleNamespace(
        curves=curves, result=summary, teacher=config.get("teacher_weights_sha256"), config=config, run=run,
        artifacts=[r.artifact for r in records if r.HasField("artifact")],
    )  # fmt: skip


READ = {"csv": read_csv, "tensorboard": read_tensorboard, "wandb": read_wandb}


@pytest.mark.parametrize("name", LOGGING)
def test_a_tracker_changes_neither_weights_nor_random_numbers(tracked, name):
    with_it, without = tracked[name], tracked["none"]
    assert with_it.record.model["weights_sha256"] == without.record.model["weights_sha256"]
    assert with_it.record.history == without.record.history
    assert with_it.drawn == without.drawn


@pytest.mark.parametrize("name", LOGGING)
def test_the_recorders_numbers_come_back(tracked, name):
    run = tracked[name]
    read = READ[name](run.folder)
    rel = 1e-6 if name == "tensorboard" else 0  # it keeps float32
    assert set(read.curves) == {"epoch", "train_loss", "valid_loss", "accuracy", "train_ce", "train_kd", "lr"}
    assert read.curves.pop("epoch") == [0, 1]
    lrs = run.learn.recorder.lrs
    for column, expected in {**history(run.learn), "lr": [lrs[len(lrs) // 2 - 1], lrs[-1]]}.items():
        assert read.curves[column] == pytest.approx(expected, rel=rel, abs=0), column


@pytest.mark.parametrize("name", LOGGING)
def test_the_result_and_the_hashes_of_both_networks_come_back(tracked, name):
    run = tracked[name]
    read = READ[name](run.folder)
    assert read.teacher == run.record.teacher["weights_sha256"]
    assert read.result["weights_sha256"] == run.record.model["weights_sha256"]
    assert read.result["best_epoch"] == run.record.best["epoch"]
    for prefix, metrics in (("", run.record.last["test"]), ("best_", run.record.best["test"])):
        assert {key: read.result[f"{prefix}test_{key}"] for key in metrics} == pytest.approx(metrics, rel=1e-6)


def test_a_run_of_weights_and_biases_is_named_and_described(tracked):
    run = tracked["wandb"]
    read = read_wandb(run.folder)
    assert (read.run.project, read.run.display_name) == ("kdfast", run.record.id)
    assert run.record.parameters.items() <= read.config.items()
    assert read.config["teacher_model"] == "mini_resnet_s"


def test_weights_are_versions_by_content_that_link_teacher_and_student(tracked):
    run = tracked["wandb"]
    teacher, student = read_wandb(run.folder).artifacts
    known = run.record.teacher["weights_sha256"], run.record.model["weights_sha256"]
    assert (teacher.name, student.name) == (run.record.teacher["run"], run.record.id)
    assert (teacher.use_after_commit, student.use_after_commit) == (True, False)
    for artifact, weights in zip((teacher, student), known, strict=True):
        assert artifact.type == "model" and weights[:12] in artifact.aliases
        assert json.loads(artifact.metadata)["weights_sha256"] == weights
        assert weights in artifact.manifest.contents[0].digest  # of which W&B makes the version's own digest


def test_without_an_account_no_network_is_used(tracked, network):
    assert read_wandb(tracked["wandb"].folder).result and nobody_called(network)


@pytest.mark.parametrize("name", LOGGING)
def test_only_the_run_is_logged_not_other_uses_of_its_learner(tmp_path, name):
    experiment, callbacks = started(name, tmp_path / "runs", tmp_path, student="mini_plain_xs", epochs=1)
    experiment.learn.lr_find(num_it=5, show_plot=False)
    experiment.fit(progress=False)
    record = experiment.finish()
    experiment.learn.validate()
    log_result(callbacks, record)
    log_result(callbacks, record)
    experiment.learn.fit(1)
    assert READ[name](tmp_path).curves["valid_loss"] == pytest.approx(record.history["valid_loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["csv", "tensorboard"])  # with W&B each attempt is a run
def test_a_second_attempt_replaces_the_curves_of_the_first(tmp_path, name):
    for _ in range(2):
        experiment, callbacks = started(name, tmp_path / "runs", tmp_path, student="mini_plain_xs", epochs=1)
        experiment.fit(progress=False)
    log_result(callbacks, experiment.finish())
    assert len(READ[name](tmp_path).curves["valid_loss"]) == 1


@pytest.mark.parametrize("name", LOGGING)
def test_a_tracker_is_pickled_as_an_empty_callback(tracked, name):
    (callback,) = tracked[name].callbacks
    assert type(pickle.loads(pickle.dumps(callback))) is Callback


FAIL = """
import sys
from pathlib import Path
from kdfast.experiment.runner import Experiment
from kdfast.training.trackers import create_tracker

experiment = Experiment({"student": "mini_plain_xs", "epochs": 2, "lr": 1e30}, sys.argv[1])
experiment.load()
experiment.learner().add_cbs(create_tracker("wandb", experiment.run, Path(sys.argv[1]), None))
experiment.fit(progress=False)
"""


def test_a_failed_run_ends_its_tracker_too(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FAIL, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "lower lr" in said
    (exit_code,) = (record.exit.exit_code for record in wandb_records(tmp_path) if record.HasField("exit"))
    assert exit_code == 1
    left = [p.info for p in psutil.process_iter(["cmdline", "status"]) if f"{process.pid}" in (p.info["cmdline"] or [])]
    assert not left


def test_no_tracker_is_no_callback(runs):
    record = read_record(next(runs.glob("digits/mini_resnet_s*/record.json")))
    assert create_tracker("none", None, runs, None) == []
    log_result([], record)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(KdfastError, match="unknown tracker 'wandB'; the nearest known: wandb"):
        create_tracker("wandB", None, tmp_path, None)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_in_a_sentence(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KdfastError, match=rf'{name} is not installed.* pip install "kdfast\[track\]"'):
        create_tracker(name, None, tmp_path, None)


def test_online_without_an_account_is_said_in_a_sentence_not_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    experiment, _ = started("wandb", tmp_path, tmp_path, student="mini_plain_xs", epochs=1)
    with pytest.raises(KdfastError, match="WANDB_MODE is online and no account is known: run `wandb login`"):
        experiment.fit(progress=False)


def test_an_account_that_does_not_work_is_said_in_a_sentence(monkeypatch, tmp_path):
    import wandb

    def refused(**settings):
        raise wandb.errors.CommError("no answer\nin 30 s")

    monkeypatch.setattr(wandb, "init", refused)
    experiment, _ = started("wandb", tmp_path, tmp_path, student="mini_plain_xs", epochs=1)
    with pytest.raises(KdfastError, match=r"W&B does not start \(no answer in 30 s\): set WANDB_MODE to offline"):
        experiment.fit(progress=False)


def test_weights_and_biases_may_be_disabled(monkeypatch, runs, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train("wandb", runs, tmp_path)
    assert not (tmp_path / "wandb").exists()
