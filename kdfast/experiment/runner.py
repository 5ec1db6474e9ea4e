"""One run from its parameters to its record: what `experiments/experiment.ipynb` calls."""

import hashlib
import time
import warnings
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastcore.foundation import L
from safetensors.torch import load_file, save

from kdfast.core import provenance
from kdfast.core.code import code_of, plugin_digests, plugin_packages, uses
from kdfast.core.config import BASELINE, Run, check_parameters, dataset_slug, switch
from kdfast.core.errors import KdfastError, number_given, unknown
from kdfast.core.files import check_writable, write_atomically
from kdfast.core.records import PREDICTIONS, RECORD, WEIGHTS, Record, pack_predictions, read_record, write_record  # fmt: skip
from kdfast.data.datasets import load_data
from kdfast.data.loaders import ImageData
from kdfast.data.splits import HoldOut
from kdfast.distill.cache import cache_folder
from kdfast.distill.method import create_method
from kdfast.distill.teacher import Teacher
from kdfast.distill.teacher_outputs import Cached, CachedOutputs
from kdfast.experiment import distributed
from kdfast.experiment.teachers import load_teacher
from kdfast.models.pretrained import load_weights
from kdfast.models.registry import architecture, count_parameters
from kdfast.training.checkpoint import Checkpoint
from kdfast.training.learner import create_learner, fit, history, plateau, to_cpu
from kdfast.training.metrics import beside_teacher, metrics, predict
from kdfast.training.trackers import create_tracker, log_result

CHECKPOINT = "checkpoint.pt"
EVERY = 20.0  # seconds between checkpoints, at least, unless KDFAST_CHECKPOINT_S says otherwise


class Experiment:
    """A run and the things made for it, in the order in which the notebook makes them."""

    def __init__(self, namespace: dict, runs: str | Path = "", tracker: str = "none"):
        """Validate a notebook's variables (`globals()`); raises a KdfastError before anything is made.

        `tracker`: where curves are logged in the run's folder, see `kdfast.training.trackers`.
        """
        self.runs = Path(runs or provenance.RUNS).expanduser()
        self.explore = switch("explore", namespace.get("explore", False))  # papermill passes `no` as a word
        self.began, self.started = time.perf_counter(), datetime.now(UTC)
        git = provenance.git_state()  # as it is now, not when the run has ended
        self.run: Run = check_parameters(namespace, self.resolve_teacher)
        self.code = {"hash": code_of(self.run), **git}
        architecture(self.run.student)
        if self.run.method != BASELINE:
            create_method(self.run.method, self.run.method_args)
        self.folder, self.tracker = self.runs / self.run.folder_name, tracker
        create_tracker(tracker, self.run, self.folder, None)  # an unknown one is refused now
        self.seconds: dict[str, float] = {}
        self.state = "new"  # of its Learner: new, then trained in part while it fits, then trained
        check_writable(self.folder)

    def resolve_teacher(self, teacher: str, dataset: str, seed: int) -> str:
        """The id of the teacher's run: given as such, or found as the one baseline of that model with that seed."""
        folder = self.runs / dataset_slug(dataset)
        if (folder / teacher / RECORD).is_file():
            return teacher
        found = sorted(path.parent.name for path in folder.glob(f"{teacher}.{BASELINE}.s{seed}-*/{RECORD}"))
        if len(found) == 1:
            return found[0]
        if found:
            raise KdfastError(f"teacher {teacher} with seed {seed} has several runs: give one id of {', '.join(found)}")
        if "." in teacher:  # a run id
            have = [path.parent.name for path in folder.glob(f"*/{RECORD}")]
            raise unknown("teacher run", teacher, have or ["none yet"], str(folder))
        architecture(teacher)
        raise KdfastError(
            f"no run of teacher {teacher} with seed {seed} in {folder}: train it first "
            f"(papermill experiments/experiment.ipynb out.ipynb -p dataset {dataset} -p student {teacher} -p seed {seed})"
        )

    def load(self) -> ImageData:
        """The data set of the run."""
        run = self.run
        self.data = load_data(run.dataset, run.image_size, HoldOut(run.valid_pct, run.folds, run.fold))
        return self.data

    def learner(self) -> Learner:
        """A fresh Learner, with the teacher's run loaded and the Distill callback if the run has a teacher."""
        teacher_folder = self.runs / dataset_slug(self.run.dataset) / self.run.teacher
        options = {"chunk": self.run.batch_size, "compiled": self.run.compile}
        self.teacher: Teacher | None = load_teacher(teacher_folder, self.data, **options) if self.run.teacher else None
        self.learn = create_learner(self.run, self.data, self.teacher, cache_folder(self.runs))
        self.initial = self._initial()
        self.trackers = create_tracker(self.tracker, self.run, self.folder, self._teacher_summary())
        every = number_given("KDFAST_CHECKPOINT_S", EVERY, "seconds")
        self.learn.add_cbs([*self.trackers, Checkpoint(self.folder / CHECKPOINT, self._about(), every)])
        load_weights(self.learn.model, to_cpu(self.learn.model.state_dict()))  # what cannot be written and read again says so now
        self.state = "new"
        return self.learn

    def _about(self) -> dict:
        """What must be equal for a run to go on from a checkpoint."""
        device = self.learn.dls.device.type  # not its number: processes that share a run differ in it
        teacher = self.teacher.record.model["weights_sha256"] if self.teacher else None
        machine = provenance.hardware(device, torch.get_num_threads())
        return {
            "run": self.run.id,
            "data": self.data.fingerprint,
            "teacher": teacher,
            "code": self.code["hash"],
            "versions": provenance.versions(),
            "machine": [machine[key] for key in ("processor", "device", "threads")],
        }

    def fit(self, progress: bool = True) -> None:
        """Train; the seconds it takes go into the record.

        A record is of one whole run from its own start: where this Learner has been trained before, to its end or not, a fresh
        one begins anew, or goes on where the interrupted one left its checkpoint.
        """
        if self.run.processes > 1 and num_distrib() == 0:
            distributed.check(self.run.batch_size, len(self.data.splits["train"]), self.run.processes)
            distributed.train(self.run.model_dump(), self.runs, self.tracker, self.run.processes)
            self._take_over(read_record(self.folder / RECORD))
            return
        if self.state != "new":
            self.learner()
        start, self.state = time.perf_counter(), "trained in part"
        fit(self.learn, self.run, progress)
        self.state = "trained"
        self.seconds["training"] = time.perf_counter() - start + self.learn.checkpoint.before

    def _take_over(self, record: Record) -> None:
        """Have in this Learner what other processes trained, for those who look at it."""
        load_weights(self.learn.model, load_file(self.folder / WEIGHTS))
        self.learn.recorder.metric_names = L("epoch", *record.history, "time")
        self.learn.recorder.values = [list(row) for row in zip(*record.history.values(), strict=True)]

    def finish(self) -> Record:
        """Evaluate the last and the best epoch's weights and write weights, predictions and record.

        Where several processes trained, the first of them has done so, and its record is read.
        """
        if self.run.processes > 1 and num_distrib() == 0:
            return read_record(self.folder / RECORD)
        epochs = len(self.learn.recorder.values) if self.state == "trained" else 0
        if epochs != self.run.epochs:
            raise KdfastError(f"run {self.run.id} is {self.state}, not trained to its last epoch: call fit() before finish()")
        start = time.perf_counter()
        self.taught = self._teachers_test_logits()
        last_state = to_cpu(self.learn.model.state_dict())
        last, logits, labels = self._evaluate(epoch=self.run.epochs - 1)
        load_weights(self.learn.model, self.learn.keep_best.best_state)
        best, _, _ = self._evaluate(epoch=self.learn.keep_best.best_epoch)
        load_weights(self.learn.model, last_state)
        self.seconds["evaluation"] = time.perf_counter() - start
        weights = save(last_state)
        record = self._record(weights, last, best)
        packed = BytesIO()
        np.savez_compressed(packed, **pack_predictions(logits.numpy(), labels.numpy()))
        write_atomically(self.folder / WEIGHTS, weights)
        write_atomically(self.folder / PREDICTIONS, packed.getvalue())
        write_record(record, self.folder / RECORD)
        self.learn.checkpoint.remove()
        for left in self.folder.glob(".*.partial"):  # by a killed attempt: this one has written everything whole
            left.unlink(missing_ok=True)
        try:
            log_result(self.trackers, record)
        except Exception as error:  # a tracker's trouble at the end must not cost the run
            warnings.warn(f"tracker {self.tracker} did not take the result of {record.id}: {error}", stacklevel=2)
        return record

    def _evaluate(self, epoch: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Validation and test metrics of the model as it is, and the test logits and labels."""
        found = {"epoch": epoch, "valid": metrics(*predict(self.learn.model, self.learn.dls[1]))}
        logits, labels = predict(self.learn.model, self.learn.dls[2])
        found["test"] = metrics(logits, labels)
        if self.taught is not None:
            found["test"] |= beside_teacher(logits, self.taught, labels)
        return found, logits, labels

    def _teachers_test_logits(self) -> torch.Tensor | None:
        """Cached ones, exact, where the run has cached teacher outputs; else the teacher is asked."""
        if self.teacher is None:
            return None
        if self.run.teacher_outputs == "live":
            self.teacher.to(self.learn.dls.device)
            return predict(self.teacher, self.learn.dls[2])[0]
        teacher_outputs = CachedOutputs(self.teacher, self.learn.dls[2], Cached(cache_folder(self.runs), "float32"))
        teacher_outputs.open(view=0)
        return teacher_outputs.all().logits.cpu()

    def _record(self, weights: bytes, last: dict, best: dict) -> Record:
        curves = history(self.learn)
        model = self.learn.model
        total = time.perf_counter() - self.began + self.learn.checkpoint.before
        return Record(
            id=self.run.id,
            parameters=self.run.model_dump(),
            model={
                "family": architecture(self.run.student).family,
                "parameters": count_parameters(model),
                "weights_sha256": hashlib.sha256(weights).hexdigest(),
                "weights_bytes": len(weights),
                **self._projectors(),
                **self.initial,
            },
            teacher=self._teacher_summary(),
            teacher_outputs=self._teacher_outputs(),
            data={
                "name": self.data.name,
                "fingerprint": self.data.fingerprint,
                "classes": list(self.data.classes),
                "counts": {part: len(index) for part, index in self.data.splits.items()},
                "split": self.data.split_rule,
                "source": self.data.source,
                "image_size": self.data.size,
            },
            code=self.code | {"plugins": plugin_digests(*uses(self.run))},
            packages=provenance.versions() | plugin_packages(*uses(self.run)),
            hardware=provenance.hardware(str(self.learn.dls.device), torch.get_num_threads()),
            time={"started": self.started.isoformat(timespec="seconds"), **self.seconds, "total": total} | self._interrupted(),
            history=curves,
            plateau=plateau(curves["valid_loss"]),
            last=last,
            best=best,
        )

    def _interrupted(self) -> dict[str, int]:
        """How often the run went on from a checkpoint, where it did."""
        times = self.learn.checkpoint.resumed
        return {"resumed": times} if times else {}

    def _teacher_outputs(self) -> dict | None:
        """Where the teacher's outputs came from, and the seconds of the training that went into making them."""
        if self.teacher is None:
            return None
        distill = self.learn.distill
        used = distill.cached_outputs
        found = {"source": self.run.teacher_outputs if used is not None else "live", "teacher_s": distill.teacher_s}
        if used is not None:
            augment = used.loader.augment
            views = len({augment.of_epoch(e) for e in range(self.run.epochs)}) if augment else 1
            return found | {"waited_s": used.waited, "views": views}
        return found | ({"why_live": distill.obstacle} if distill.obstacle else {})

    def _projectors(self) -> dict[str, int]:
        """How many parameters were trained beside the student, where a method has such."""
        count = count_parameters(self.learn.distill.projectors) if self.teacher is not None else 0
        return {"projector_parameters": count} if count else {}

    def _initial(self) -> dict[str, dict]:
        """Where the weights came from, if not random, with the hash of the file or, of torchvision's, of the network."""
        file = Path(self.run.weights).expanduser()
        if not self.run.weights:
            return {}
        if file.is_file():
            known = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        else:
            known = {"network_sha256": hashlib.sha256(save(to_cpu(self.learn.model.state_dict()))).hexdigest()}
        return {"initial": {"weights": self.run.weights, **known}}

    def _teacher_summary(self) -> dict | None:
        if self.teacher is None:
            return None
        record = self.teacher.record
        return {
            "run": record.id,
            "model": record.parameters["student"],
            **{key: record.model[key] for key in ("family", "parameters", "weights_sha256")},
            "test": record.last["test"],
        }
