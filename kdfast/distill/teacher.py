"""The teacher: in eval mode, without gradients, unchanged, and hidden from the student's Learner."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from fastai.data.transforms import IntToFloatTensor
from fastai.learner import Learner
from safetensors.torch import save
from torch import Tensor, nn

from kdfast.core.errors import KdfastError
from kdfast.core.records import Record
from kdfast.distill.features import Features, Outputs
from kdfast.distill.hooks import Point, evaluating, watching

Stats = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel


class Teacher:
    """What a network, or the mean of several, says of the student's batches.

    The network itself is as it was before and after each of its forwards: modes, requires_grad, weights, statistics,
    hooks. Not an nn.Module, so that a Learner or Callback that holds one neither trains it nor saves its weights.
    """

    def __init__(
        self,
        # logits (B, C) of images (B, 3, H, W); of several, probabilities are averaged; or what makes one when it is needed
        model: nn.Module | Sequence[nn.Module] | Callable[[], nn.Module],
        record: Record | None = None,  # of its run
        *,
        classes: Sequence[str] | None = None,  # class c of its logits; checked against the student's
        size: int | tuple[int, int] | None = None,  # of the images it takes, in pixels; None: as the student's
        stats: Stats | None = None,  # with which its images are normalised; None: as the student's
        student_stats: Stats | None = None,  # those of the student; None: found in its DataLoaders
        chunk: int | None = None,  # images a forward, the last filled up: kernels round by batch size; None: whole batches
        compiled: bool = False,  # by torch.compile; for methods of logits
    ):
        self.source, self.chunk, self.compiled = model, chunk, compiled
        self.record, self.classes = record, None if classes is None else tuple(map(str, classes))
        self.size, self.stats, self.student_stats = size, stats, student_stats

    @cached_property
    def models(self) -> list[nn.Module]:
        """The networks, made now if they were not before."""
        if isinstance(self.source, nn.Module):
            models = [self.source]
        else:
            models = list(self.source) if isinstance(self.source, Iterable) else [self.source()]
        for model in models if self.compiled else ():
            model.compile()
        return models

    @property
    def is_lazy(self) -> bool:
        """Whether its network is still to be made."""
        return "models" not in self.__dict__ and not isinstance(self.source, (nn.Module, Iterable))

    def identity(self) -> dict[str, Any]:
        """What decides its outputs: hashes of weights and structure, and how it wants its images."""
        if self.record is not None:
            who = {"model": self.record.parameters["student"], "weights": self.record.model["weights_sha256"]}
        else:
            who = {"model": _sha256(repr(self.models).encode()), "weights": _sha256(*map(_bytes, self.models))}
        return who | {"size": self.size, "stats": self.stats, "student_stats": self.student_stats}

    @property
    def model(self) -> nn.Module:
        """The network, or the first of several."""
        return self.models[0]

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format) -> "Teacher":
        for model in self.models:
            model.to(device, memory_format=memory_format)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, H, W); of several, those of their mean at temperature 1."""
        return self.outputs((x,)).softened(1).logits

    @torch.no_grad()
    def outputs(self, inputs: Sequence[Tensor], features: Features | None = None) -> Outputs:
        """Logits of the student's batch, and the features that `features` asks for: the one place where a teacher runs."""
        inputs, points = self.view(inputs), features.points if features else []
        found = [self._forward(model, inputs, points) for model in self.models]
        logits, seen = found[0]
        if len(found) > 1:
            return Outputs(logits, members=[member for member, _ in found])
        return features.outputs(logits, seen) if features else Outputs(logits)

    def _forward(self, model: nn.Module, inputs: Sequence[Tensor], points: list[Point]) -> tuple[Tensor, dict[Point, Tensor]]:
        """Logits (B, C) and what was seen at the points, in chunks of one size, the last filled up with zeros.

        Kernels round differently at different batch sizes: with one size an image has the same logits in every batch.
        """
        n = len(inputs[0])
        size = self.chunk or n
        pieces = []
        for start in range(0, n, size):
            piece = [_filled(x[start : start + size], size) for x in inputs]
            with evaluating(model), watching(model, points) as seen:
                logits = model(*piece).as_subclass(Tensor)
            pieces.append((logits, seen))
        if n == size:
            return pieces[0]
        joined = {point: torch.cat([seen[point] for _, seen in pieces])[:n] for point in points}
        return torch.cat([logits for logits, _ in pieces])[:n], joined

    def view(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The student's images as this teacher wants them: normalised in its way, of its size."""
        x, *others = inputs
        if self.stats is not None and self.student_stats is not None and self.stats != self.student_stats:
            (m_s, s_s), (m_t, s_t) = (
                [torch.as_tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in stats]
                for stats in (self.student_stats, self.stats)
            )
            x = (x * s_s + m_s - m_t) / s_t
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        if size is not None and tuple(x.shape[-2:]) != tuple(size):
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return x, *others

    def meet(self, learn: Learner) -> None:
        """Before a fit: a KdfastError if the two cannot work together. The networks are not made for it."""
        if not self.is_lazy and any(module is learn.model for model in self.models for module in model.modules()):
            raise KdfastError("the teacher is the student itself: give it a copy (copy.deepcopy) or a network of its own")
        theirs, ours = self.classes, vocabulary(learn.dls)
        if theirs and ours and theirs != ours:
            what = difference(theirs, ours)
            raise KdfastError(f"the teacher does not fit the data: it has {what}; train a teacher on these classes")
        if self.stats is not None and self.student_stats is None:
            self.student_stats = normalisation(learn.dls)
            if self.student_stats is None:
                raise KdfastError("the teacher's stats are known, the student's not: give Teacher(…, student_stats=(mean, std))")

    def check(self, logits: Tensor, prediction: Tensor) -> None:
        """After the first forward: as many classes as the student."""
        if logits.shape != prediction.shape:
            theirs, ours = tuple(logits.shape), tuple(prediction.shape)
            raise KdfastError(f"teacher and student differ in output, {theirs} and {ours}: train it on the student's classes")

    def check_dtype(self, x: Tensor) -> None:
        """Weights and images of one type, unless autocast sees to it."""
        kinds = {p.dtype for model in self.models for p in model.parameters() if p.is_floating_point()}
        if not torch.is_autocast_enabled(x.device.type) and kinds - {x.dtype}:
            kind = str(sorted(map(str, kinds - {x.dtype}))[0]).removeprefix("torch.")
            wanted = str(x.dtype).removeprefix("torch.")
            raise KdfastError(f"the teacher's weights are {kind} and the images {wanted}: convert it, teacher.to(torch.{wanted})")

    def __getstate__(self):
        raise KdfastError("a teacher is not exported with its student: remove the Distill callback before pickling")


def as_teacher(teacher: Any) -> Teacher:
    """A Teacher of a Teacher, a Learner, a Module, or a list of Learners and Modules.

    Of a Learner, the classes and the normalisation are known too.
    """
    if isinstance(teacher, Teacher):
        return teacher
    several = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not several:
        raise KdfastError("no teacher in the list: give at least one Learner or Module")
    for one in several:
        if not isinstance(one, (Learner, nn.Module)):
            raise KdfastError(f"a teacher is a Learner, a Module, a list of them or load_teacher(…), not {type(one).__name__}")
    learners = [one for one in several if isinstance(one, Learner)]
    vocabularies = {vocabulary(one.dls) for one in learners} - {None}
    stats = [normalisation(one.dls) for one in learners]
    if len(vocabularies) > 1 or len({repr(s) for s in stats}) > 1:
        raise KdfastError("the teachers in the list differ in classes or normalisation: distil from those that agree")
    classes = vocabularies.pop() if vocabularies else None
    known = stats[0] if len(learners) == len(several) else None
    return Teacher([one.model if isinstance(one, Learner) else one for one in several], classes=classes, stats=known)


def vocabulary(dls) -> tuple[str, ...] | None:
    """The class names of DataLoaders; None where they have none."""
    vocab = getattr(dls, "vocab", None)
    return tuple(map(str, vocab)) if vocab is not None and not isinstance(vocab, (str, dict)) else None


def normalisation(dls) -> Stats | None:
    """Mean and standard deviation with which DataLoaders normalise their batches, a value a channel; None if unknown."""
    transforms = getattr(getattr(dls, "after_batch", None), "fs", ())
    for transform in transforms:
        mean, std = getattr(transform, "mean", None), getattr(transform, "std", None)
        if isinstance(mean, Tensor) and isinstance(std, Tensor):
            return mean.flatten().tolist(), std.flatten().tolist()
    plain = any(isinstance(transform, IntToFloatTensor) for transform in transforms)
    return ([0.0] * 3, [1.0] * 3) if plain else None


def difference(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """In what two lists of class names differ, in words."""
    if len(theirs) != len(ours):
        return f"{len(theirs)} classes, the data {len(ours)}"
    c = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
    return f"{theirs[c]!r} as class {c} where the data has {ours[c]!r}"


def _filled(x: Tensor, size: int) -> Tensor:
    missing = size - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _sha256(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _bytes(model: nn.Module) -> bytes:
    return save({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()})
