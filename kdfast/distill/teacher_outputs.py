"""Cached teacher_outputs: what a teacher says of the training images is computed once a view and shared by all that ask.

A view is a function of (seed, number, image) (`kdfast.data.augment`), so that logits computed now are those of the very crop
that a student sees later, in this run or another. Whatever fails in the cache, a run goes on: what it cannot read or
write it computes for itself, to the same values.
"""

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from fastai.callback.mixup import MixHandler
from fastai.learner import Learner
from torch import Tensor
from tqdm.auto import tqdm

from kdfast.core import provenance
from kdfast.core.code import code_hash
from kdfast.core.errors import KdfastError, unknown
from kdfast.data.loaders import BatchDL
from kdfast.distill.cache import Cache, Key
from kdfast.distill.features import Features, Outputs
from kdfast.distill.stages import probe
from kdfast.distill.teacher import Teacher

DTYPES = {"float16": torch.float16, "float32": torch.float32}
FIELDS = frozenset({"logits", "pooled"})  # vectors, small enough to be kept; maps are not
CODE = ("kdfast.distill.teacher_outputs", "kdfast.models.registry")  # what outputs depend on, and all that these import


@dataclass(frozen=True)
class Cached:
    """That a teacher's outputs are to be cached, where, and how: `Distill(teacher, KD(), cached=Cached("cache"))`."""

    folder: str | Path
    dtype: str = "float16"  # or float32: then a run is, bit for bit, that with a live teacher
    fallback: bool = False  # whether what cannot be cached (feature maps, MixUp) gets a live teacher instead of an error
    limit_gb: float | None = None  # see kdfast.distill.cache.Cache

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise unknown("dtype of cached teacher outputs", self.dtype, DTYPES)

    def obstacle(self, learn: Learner, teacher: Teacher, wanted: Iterable[str]) -> str | None:
        """Why this Learner needs a live teacher; None if cached teacher outputs will do."""
        features = sorted(set(wanted) - FIELDS)
        mixing = [type(cb).__name__ for cb in learn.cbs if isinstance(cb, MixHandler)]
        if features:
            return f"the method compares {' and '.join(features)}, which are too large to be cached"
        if mixing:
            return f"{mixing[0]} changes the images after the view is drawn"
        if not isinstance(learn.dls.train, BatchDL):
            return "the images do not come from kdfast's dataloaders, whose views can be drawn again"
        if not teacher.is_lazy and len(teacher.models) > 1:
            return "several teachers answer"
        return None


@dataclass
class CachedOutputs:
    """A teacher's outputs to the images of a loader, by view and image."""

    teacher: Teacher
    loader: BatchDL
    cached: Cached
    fields: frozenset[str] = frozenset({"logits"})
    autocast: torch.dtype | None = None  # in which a live teacher would run
    progress: bool = False  # draw a bar where views are computed
    seconds: float = 0.0  # spent on computing views
    waited: float = 0.0  # spent on waiting for others that computed them
    cache: Cache | None = field(init=False)
    tensors: dict[str, Tensor] = field(init=False, default_factory=dict)  # of the view that is open
    made: tuple[int, dict[str, Tensor]] = field(init=False, default=(-1, {}))  # the view computed last

    def __post_init__(self):
        self.cache = Cache(self.cached.folder, self.cached.limit_gb)
        index = self.loader.dataset.index
        self.row = torch.full((len(self.loader.dataset.images),), -1)
        self.row[index] = torch.arange(len(index))
        self.features: Features | None = None
        self.key = self._key()

    def _key(self) -> Key:
        """Everything that the outputs depend on but the view's number."""
        data, augment, device = self.loader.dataset, self.loader.augment, torch.device(self.loader.device)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        identity, record = self.teacher.identity(), self.teacher.record
        who = record.id if record else identity["model"][:40]
        return {
            "name": f"{who}.{data.name}.{data.part}",
            "teacher": identity,
            "data": {"fingerprint": data.fingerprint, "part": data.part, "images": provenance.digest(data.index.numpy())},
            "views": None if augment is None else {k: v for k, v in asdict(augment).items() if k not in ("view", "views")},
            "normalisation": [list(map(float, v.flatten())) for v in self.loader.normalisation],
            "fields": sorted(self.fields),
            "dtype": self.cached.dtype,
            "autocast": None if self.autocast is None else str(self.autocast),
            "chunk": self.teacher.chunk,
            "threads": torch.get_num_threads(),
            "processor": [device.type, gpu or torch.backends.cpu.get_cpu_capability()],
            "torch": torch.__version__,
            "code": code_hash(roots=CODE, notebook=None),
        }

    def open(self, view: int, ahead: Sequence[int] = ()) -> None:
        """Have the outputs for a view at hand. While another process computes it, some of those `ahead` are computed here."""
        while True:
            found = self._read(view)
            if found is not None:
                self.tensors = found
                return
            if not self._make_one([view, *ahead]):
                start = time.perf_counter()
                time.sleep(0.05)
                self.waited += time.perf_counter() - start

    def _read(self, view: int) -> dict[str, Tensor] | None:
        if self.cache is None:  # it could not be written
            return self.made[1] if self.made[0] == view else self._compute(view)
        return self.cache.read(self.key, _part(view))

    def _make_one(self, views: Sequence[int]) -> bool:
        """Compute and store the first of these views that nobody has or is at; whether there was one."""
        for view in views:
            if view != views[0] and self.cache.has(self.key, _part(view)):
                continue
            try:
                with self.cache.lock(self.key, _part(view)) as mine:
                    if not mine:
                        continue
                    if self.cache.read(self.key, _part(view)) is None:  # nor has it come in the meantime
                        self.made = view, self._compute(view)
                        self.cache.write(self.key, _part(view), self.made[1])
                    return True
            except OSError as error:
                why, folder = error.strerror or str(error), self.cache.folder
                warnings.warn(f"teacher outputs cannot be cached in {folder} ({why}): this run computes its own", stacklevel=2)
                self.cache = None
                return True
        return False

    def outputs(self, index: Tensor) -> Outputs:
        """The outputs for images by their number in the data set (B,), in float32 on the loader's device."""
        rows = self.row[index]
        taken = {name: tensor[rows].to(self.loader.device, non_blocking=True).float() for name, tensor in self.tensors.items()}
        return Outputs(**taken)

    def all(self) -> Outputs:
        """The outputs for all images of the loader in the data set's order."""
        return self.outputs(self.loader.dataset.index)

    # Computing

    @torch.no_grad()
    def _compute(self, view: int) -> dict[str, Tensor]:
        start = time.perf_counter()
        self.teacher.to(torch.device(self.loader.device))
        chunks = self.loader.dataset.index.split(self.teacher.chunk or self.loader.bs)
        said = []
        for index in tqdm(chunks, desc=f"teacher, view {view}", leave=False, disable=not self.progress):
            images = self.loader.images(index, view)
            if self.features is None and "pooled" in self.fields:
                layout = probe(self.teacher.model, self.teacher.view((images[:2],)))
                self.features = Features(self.teacher.model, layout, self.fields, ())
            with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
                outputs = self.teacher.outputs((images,), self.features)
            said.append({name: getattr(outputs, name).float().cpu() for name in self.fields})
        whole = {name: self._rounded(name, torch.cat([piece[name] for piece in said])) for name in sorted(self.fields)}
        self.seconds += time.perf_counter() - start
        return whole

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        rounded = x.to(DTYPES[self.cached.dtype])
        if not rounded.isfinite().all():
            remedy = "cache float32" if x.isfinite().all() else "check the teacher's weights"
            raise KdfastError(f"the teacher's {name} reach {x.abs().max():g}, which {self.cached.dtype} does not hold: {remedy}")
        return rounded


def _part(view: int) -> str:
    return f"view-{view:04d}"
