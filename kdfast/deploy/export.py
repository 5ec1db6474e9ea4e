"""The student for those who only use it: an ONNX file, the same in int8, and a model card.

exported = export_student(learn, "student", record=record)
exported.accuracy  # {"torch": 0.97, "onnx": 0.97, "int8": 0.968}
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from fastai.data.core import TfmdDL
from fastai.learner import Learner
from torch import Tensor, nn

from kdfast.core.errors import KdfastError
from kdfast.core.records import Record
from kdfast.core.rng import OwnStream
from kdfast.data.loaders import BatchDL
from kdfast.deploy.model_card import CARD, Facts, facts_of, write_card
from kdfast.deploy.onnx import Network, runner, write_int8, write_onnx
from kdfast.distill.teacher import Stats

ONNX, INT8 = "student.onnx", "student.int8.onnx"
CHECKED = 256  # validation images on which they are compared, at most
Batches = Iterable[tuple[Tensor, Tensor]]  # RGB images (N, 3, H, W) on the scale 0…1 and class ids (N,)


@dataclass(frozen=True)
class Exported:
    """The files of an exported student and what they are worth."""

    folder: Path
    onnx: Path
    int8: Path | None
    card: Path
    accuracy: dict[str, float]  # of torch, onnx and int8, fractions
    part: str  # whose images the accuracy is of: test, or valid where there is no test part
    difference: float  # largest one of a logit between torch and onnx, over validation images


def export_student(
    learn: Learner,
    folder: str | Path,
    *,
    quantize: bool = True,
    calibration: Tensor | None = None,  # RGB images (N, 3, H, W) on the scale 0…1 to calibrate int8 with
    n_calibration: int = 256,  # otherwise: so many training images, not augmented, evenly spread over all
    tolerance: float = 1e-4,  # by which a logit of the ONNX file may differ from torch's
    record: Record | None = None,  # of the run that trained the student
    name: str = "",  # of the architecture; "": the record's, or the class of the network
) -> Exported:
    """Write `student.onnx`, with `quantize` `student.int8.onnx`, and their model card `README.md` into `folder`.

    The network takes any number of RGB images on the scale 0…1, of the size it was trained on: the normalisation of the Learner's
    DataLoaders is part of it. Nothing of teacher or projectors is. A KdfastError, and no file, where the weights are not the
    record's, a fact is missing, ONNX cannot express the network, or its logits are not torch's. The same weights give the same
    files. Test images serve the accuracies alone. An earlier export in `folder` is replaced.
    """
    target, parts = Path(folder).absolute(), _parts(learn)
    with OwnStream(), _whole(target) as partial:
        facts = facts_of(learn, parts["valid"], record, name)
        network = Portable(learn.model, facts.stats)
        write_onnx(network, facts.size, partial / ONNX, facts.properties())
        runs = {"torch": torch.no_grad()(network), "onnx": runner(partial / ONNX)}
        difference = _check(runs, images_of(parts["valid"], facts.stats, CHECKED), tolerance)
        if quantize:
            images = _calibration(calibration, parts["train"], facts, n_calibration)
            facts.int8 = write_int8(partial / ONNX, partial / INT8, images)
            facts.calibrated = f"{len(images)} {'training' if calibration is None else 'other'} images"
            runs["int8"] = runner(partial / INT8)
        part = "test" if "test" in parts else "valid"
        accuracy = _accuracy(runs, images_of(parts[part], facts.stats))
        write_card(partial, facts, accuracy, f"{len(parts[part].dataset)} {part} images", tolerance)
    return Exported(target, target / ONNX, target / INT8 if quantize else None, target / CARD, accuracy, part, difference)


class Portable(nn.Module):
    """A copy of a network, on the CPU and in eval mode, with its normalisation: it takes RGB images on the scale 0…1."""

    def __init__(self, network: nn.Module, stats: Stats):
        super().__init__()
        self.network = deepcopy(network).cpu().float().to(memory_format=torch.contiguous_format)
        for name, values in zip(("mean", "std"), stats, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.network((image - self.mean) / self.std)


# Images


def _parts(learn: Learner) -> dict[str, TfmdDL]:
    """The Learner's train, valid and test loaders; no test where there are but two or it is empty."""
    parts = {part: dl for part, dl in zip(("train", "valid", "test"), learn.dls.loaders, strict=False) if len(dl.dataset)}
    if not {"train", "valid"} <= set(parts):
        raise KdfastError("the Learner has no training or no validation images: the exported file is checked on both")
    return parts


def images_of(dl: TfmdDL, stats: Stats, limit: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of RGB images (N, 3, H, W) on the scale 0…1 and class ids (N,), on the CPU, in order and not augmented.

    With `limit` at most so many, evenly spread over all.
    """
    n = len(dl.dataset)
    numbers = torch.linspace(0, n - 1, min(limit or n, n)).round().long().tolist()
    plain = {"augment": None} if isinstance(dl, BatchDL) else {}
    in_order = dl.new(shuffle=False, drop_last=False, get_idxs=lambda: numbers, **plain)
    as_valid = dl.dataset.set_split_idx(1) if hasattr(dl.dataset, "set_split_idx") else nullcontext()
    mean, std = (torch.tensor(values)[:, None, None] for values in stats)
    with as_valid:
        for x, y in in_order:
            yield x.as_subclass(Tensor).cpu().float() * std + mean, y.as_subclass(Tensor).cpu()


def _calibration(images: Tensor | None, train: TfmdDL, facts: Facts, n: int) -> Tensor:
    if images is None:
        return torch.cat([batch for batch, _ in images_of(train, facts.stats, n)])
    wanted, (low, high) = (3, *facts.size), torch.aminmax(images)
    if images.ndim != 4 or images.shape[1:] != wanted or low < 0 or high > 1:
        raise KdfastError(f"calibration must be images (N, {', '.join(map(str, wanted))}) on the scale 0…1")
    return images.cpu().float()


def _check(runs: dict[str, Network], batches: Batches, tolerance: float) -> float:
    """The largest difference of a logit between torch and onnx; a KdfastError above the tolerance."""
    difference = torch.stack([(runs["torch"](x) - runs["onnx"](x)).abs().max() for x, _ in batches]).max().item()
    if not difference <= tolerance:
        raise KdfastError(
            f"the ONNX file's logits differ from the network's by up to {difference:.2g} on validation images, more than "
            f"{tolerance:g}: it branches on values, which tracing does not see, or rounds so much that tolerance must be larger"
        )
    return difference


def _accuracy(runs: dict[str, Network], batches: Batches) -> dict[str, float]:
    hits, n = dict.fromkeys(runs, 0), 0
    for images, labels in batches:
        n += len(labels)
        for name, run in runs.items():
            hits[name] += int((run(images).argmax(1) == labels).sum())
    return {name: hit / n for name, hit in hits.items()}


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write in; in the end it takes that one's place, or goes if something went wrong."""
    ours = {ONNX, INT8, CARD}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= ours):
        raise KdfastError(f"{folder} holds other things than an exported student: name a new folder")
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
