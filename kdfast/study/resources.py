"""What a run will take, estimated from its networks and images before it is started: operations, memory, minutes.

Estimates order a study's runs (the longest first) and are what a cluster is asked for; a study file may say otherwise.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kdfast.core.config import Run
from kdfast.core.defaults import NAMED
from kdfast.core.files import write_atomically
from kdfast.study.study_file import Study

COSTS = Path("build/costs.json")  # of networks and data sets, see `estimate_costs`
LIBRARIES_MB = 1500  # torch and fastai imported, with a notebook's kernel and papermill around them
OPERATIONS_S, BYTES_S = 3e10, 2e9  # that a core does, and that it moves: an epoch's images pass three times
GPU = 20  # times a core, at least
STEP_S, START_S = 0.005, 10.0  # of a step beside its operations, of a run beside its steps
LIMIT, SHORTEST_MIN = 3, 10  # times the estimate, and no limit below so many minutes: it is there for what hangs
UNKNOWN = {"flops": 1, "parameters": 0, "saved_bytes": 0}
SMALL_S = 120.0  # a run that is estimated to take no longer shares a cluster's job with others


class Needs(NamedTuple):
    """What is asked for a run."""

    gpu: int
    mem_mb: int
    minutes: int  # the limit
    seconds: float  # the estimate


def estimate_costs(studies: Iterable[Study]) -> None:
    """Write, of every network of these studies, operations and bytes an image and its parameters, and each data set's images.

    What is known of other studies stays: their jobs may be running.
    """
    from kdfast.models.flops import network_costs

    known = Estimates()
    found = {"networks": known.networks, "images": known.images}
    done: set[str] = set()
    for study in studies:
        found["images"][study.dataset] = _count_images(study.dataset)
        for run in study.baseline_runs():
            key = _key(run.student, run.image_size)
            if key not in done:
                done.add(key)
                try:
                    found["networks"][key] = network_costs(run.student, 10, run.image_size)
                except Exception:  # what cannot run at that size says so as a run; here it only has no place in the order
                    found["networks"][key] = UNKNOWN
    write_atomically(COSTS, json.dumps(found).encode())


def _count_images(dataset: str) -> int:
    if dataset in NAMED:
        return NAMED[dataset].official or 1797  # digits
    return sum(1 for path in Path(dataset).rglob("*") if path.is_file())


def _key(network: str, image_size: int) -> str:
    return f"{network} {image_size}px"


class Estimates:
    """From what `estimate_costs` wrote; networks of which it says nothing count alike."""

    def __init__(self, costs: Path | None = None):
        costs = costs or COSTS
        known = json.loads(costs.read_text()) if costs.is_file() else {}
        self.networks: dict[str, dict[str, int]] = known.get("networks", {})
        self.images: dict[str, int] = known.get("images", {})

    def _network(self, name: str, image_size: int) -> dict[str, int]:
        return self.networks.get(_key(name, image_size), UNKNOWN)

    def know(self, runs: Iterable[Run]) -> bool:
        """Whether all these runs' networks and images have been looked at."""
        return all(_key(run.student, run.image_size) in self.networks and run.dataset in self.images for run in runs)

    def operations(self, run: Run) -> float:
        """Of a run, for each of its training images: a backward costs two forwards."""
        teacher = self._network(run.teacher.split(".")[0], run.image_size)["flops"] if run.teacher else 0
        asked = run.epochs if run.teacher_outputs == "live" else run.views or min(run.epochs, 10)
        return run.epochs * 3 * self._network(run.student, run.image_size)["flops"] + asked * teacher

    def needs(self, run: Run, study: Study) -> Needs:
        """What to ask for a run of a study; what the study says holds."""
        said, images = study.resources, self.images.get(run.dataset, 10_000)
        moved = run.epochs * 3 * self._network(run.student, run.image_size)["saved_bytes"]
        working = images * (self.operations(run) / OPERATIONS_S + moved / BYTES_S)
        seconds = START_S + STEP_S * run.epochs * images / run.batch_size + working / (GPU if said.gpu else 1)
        minutes = said.minutes or max(SHORTEST_MIN, math.ceil(LIMIT * seconds / 60))
        return Needs(max(said.gpu, run.processes) if said.gpu else 0, said.mem_mb or self._memory(run, images), minutes, seconds)

    def _memory(self, run: Run, images: int) -> int:
        """MB: weights, gradients and two moments; what a forward keeps for the backward; a teacher; the decoded images."""
        student = self._network(run.student, run.image_size)
        teacher = self._network(run.teacher.split(".")[0], run.image_size) if run.teacher else UNKNOWN
        training = 16 * student["parameters"] + run.batch_size * (student["saved_bytes"] + teacher["saved_bytes"] // 2)
        held = 4 * teacher["parameters"] + images * 3 * run.image_size**2
        copies = 1 if run.processes == 1 else run.processes + 1  # and the notebook's own
        weights = 16 * student["parameters"] * (run.processes - 1)  # the batch is shared, they are not
        return math.ceil(copies * (LIBRARIES_MB + held / 1e6) + (1.25 * training + weights) / 1e6)
