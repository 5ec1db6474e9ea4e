"""Trackers: where the curves of a run are logged beside its record, chosen by one name.

Each gets the same numbers under the Recorder's names once an epoch, then the result, and names the teacher's weights by the
hash of their content. fastai's callbacks do not serve: CSVLogger has no learning rate and empties its file at `validate()`,
TensorBoardCallback fails on torch's optimizers, WandbCallback on other callbacks, and it draws from torch's generator.
"""

import atexit
import json
import os
from contextlib import redirect_stderr
from importlib import import_module
from io import StringIO
from pathlib import Path
from shutil import rmtree

import pandas as pd
from fastai.callback.core import Callback
from fastai.learner import Recorder

from kdfast.core.config import Run
from kdfast.core.errors import KdfastError, unknown
from kdfast.core.extras import extra
from kdfast.core.files import write_atomically
from kdfast.core.records import WEIGHTS, Record

TRACKERS = ("none", "csv", "tensorboard", "wandb")


def create_tracker(name: str, run: Run, folder: Path, teacher: dict | None) -> list[Callback]:
    """The callbacks that log `run` under `folder`; `teacher` is its summary in the record. Nothing is written before a fit."""
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if name in ("tensorboard", "wandb"):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else wandb reports its own to its makers
        with extra("track"):
            import_module(name)
    if name == "wandb":
        _wandb_mode()  # a misspelt one is refused now
    kinds = {"none": [], "csv": [CSV], "tensorboard": [TensorBoard], "wandb": [WandB]}
    return [kind(run, Path(folder), teacher) for kind in kinds[name]]


def log_result(callbacks: list[Callback], record: Record) -> None:
    """Log test metrics of the last and the best epoch and the weights' hash, and close the tracker, if there is one."""
    last, best = record.last["test"].items(), record.best["test"].items()
    result = {**{f"test_{k}": v for k, v in last}, **{f"best_test_{k}": v for k, v in best}, "best_epoch": record.best["epoch"]}
    for tracker in callbacks:
        if isinstance(tracker, Tracker) and tracker.state == "open":
            tracker.state = "closed"
            tracker.close(result, record.model["weights_sha256"])


class Tracker(Callback):
    """What all have in common: neither the Learner nor a random generator is changed. A kind has `open`, `log` and `close`."""

    order = Recorder.order + 1

    def __init__(self, run: Run, folder: Path, teacher: dict | None):
        self.folder, self.teacher, self.rows, self.state = folder, teacher, [], "new"
        self.about = {"id": run.id, **run.model_dump(), **{f"teacher_{key}": value for key, value in (teacher or {}).items()}}

    def __reduce__(self):  # with its Learner
        return Callback, ()

    def before_fit(self):
        self.watched = not hasattr(self.learn, "lr_finder") and not self.learn.lock.locked()  # nor validate, get_preds
        if self.watched and self.state == "new":
            self.folder.mkdir(parents=True, exist_ok=True)
            self.open()
            self.state = "open"

    def after_epoch(self):
        if self.watched and self.state == "open":
            row = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1], strict=False))  # the last name is time
            self.rows.append({"epoch": self.epoch, **row, "lr": self.recorder.lrs[-1]})
            self.log({name: value for name, value in self.rows[-1].items() if value is not None}, len(self.rows) - 1)

    def snapshot(self):
        return {"rows": [{k: None if v is None else float(v) for k, v in row.items()} for row in self.rows]}

    def resume(self, state):
        for row in state["rows"]:
            self.rows.append(row)
            self.log({name: value for name, value in row.items() if value is not None}, len(self.rows) - 1)


class CSV(Tracker):
    """`history.csv`, a row an epoch; what is no curve is in `tracker.json` beside it."""

    def open(self):
        write_atomically(self.folder / "tracker.json", json.dumps(self.about, indent=1).encode())

    def log(self, row, step):
        write_atomically(self.folder / "history.csv", pd.DataFrame(self.rows).to_csv(index=False).encode())

    def close(self, result, weights):
        self.about["result"] = result | {"weights_sha256": weights}
        self.open()


class TensorBoard(Tracker):
    """`tensorboard/`: scalars, the teacher as text, and at the end parameters and result for the HParams tab."""

    def open(self):
        rmtree(self.folder / "tensorboard", ignore_errors=True)  # a former attempt's curves would be drawn into these
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(self.folder / "tensorboard"))
        self.writer.add_text("teacher", json.dumps(self.teacher))

    def log(self, row, step):
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run that fails has its curves up to here

    def close(self, result, weights):
        plain = {key: v if isinstance(v, (str, int, float)) else json.dumps(v) for key, v in self.about.items()}
        self.writer.add_hparams(plain | {"weights_sha256": weights}, result, run_name=".", global_step=len(self.rows))
        self.writer.add_text("weights_sha256", weights)
        self.writer.close()


def _wandb_mode() -> str:
    """What WANDB_MODE asks for, in any case; a KdfastError for what wandb does not know, which it would take for online."""
    asked, known = os.environ.get("WANDB_MODE", "").lower(), ("", "online", "offline", "disabled", "dryrun", "shared")
    if asked not in known:
        raise unknown("WANDB_MODE", asked, known[1:])
    return asked


class WandB(Tracker):
    """A run of the project kdfast, offline in `wandb/` unless the user is logged in or WANDB_MODE says otherwise.

    Weights are artifacts named by their run, their only content a reference to their SHA-256, so that equal weights are one
    version (alias: 12 digits of the hash), which links the run that trained a teacher with those that use it.
    """

    def open(self):
        self.wandb, asked = import_module("wandb"), _wandb_mode()
        known = self.wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        if asked == "online" and not known:  # wandb would ask for the key
            raise KdfastError("WANDB_MODE is online and no account is known: run `wandb login`, or set it to offline")
        mode = asked or (None if known else "offline")  # None: as wandb is configured
        where = {"project": "kdfast", "name": self.about["id"], "dir": self.folder, "config": self.about, "mode": mode}
        # neither stdout nor notebook code is taken, and other runs of wandb go on; what is not uploaded waits for `wandb sync`
        quiet = {"silent": True, "console": "off", "save_code": False, "x_disable_stats": True, "reinit": "create_new"}
        try:
            self.tracked = self.wandb.init(**where, settings={**quiet, "init_timeout": 30, "finish_timeout": 60})
        except self.wandb.Error as error:
            raise KdfastError(f"W&B does not start ({' '.join(str(error).split())}): set WANDB_MODE to offline") from None
        atexit.register(self.tracked.finish, exit_code=1)  # nothing is left to finish then unless the run failed
        if self.teacher:
            self._version(self.teacher["run"], self.teacher["weights_sha256"], self.teacher, used=True)

    def log(self, row, step):
        self.tracked.log(row, step=step)

    def close(self, result, weights):
        self.tracked.summary.update(result | {"weights_sha256": weights})
        self._version(self.about["id"], weights, result, used=False)
        self.tracked.finish()

    def _version(self, run_id: str, weights: str, metadata: dict, used: bool):
        artifact = self.wandb.Artifact(run_id, "model", metadata=metadata | {"weights_sha256": weights})
        with redirect_stderr(StringIO()):  # it warns that it cannot check what is behind such an address
            artifact.add_reference(f"sha256:{weights}", WEIGHTS)
        if not self.tracked.disabled:  # by WANDB_MODE. Public `use_artifact` does the following too, but refuses offline
            self.tracked._log_artifact(artifact, aliases=[weights[:12]], use_after_commit=used)
