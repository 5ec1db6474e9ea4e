"""Images in memory, and the fastai DataLoaders that serve them. Where they come from: `kdfast.data.datasets`.

A data set is held as bytes (N, 3, H, W); batches are cut from it as tensors, so that a loader costs next to nothing
beside a training step of a small network.
"""

import hashlib
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import TensorImage, default_device
from fastai.vision.core import TensorCategory
from fastcore.foundation import L
from fasttransform import Transform
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kdfast.data.augment import Augment


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images with its train, validation and test parts."""

    name: str
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # class c of a label or a logit is classes[c]
    files: tuple[str, ...]  # where each image came from, for people
    splits: dict[str, Tensor]  # "train", "valid", "test" -> int64 indices
    split_rule: str  # how the parts were made, in words
    source: str = ""  # the folder that a named data set was found in
    published_stats: tuple[list[float], list[float]] | None = None  # mean, std to normalise by; None: of the training images

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of pixels, labels, class names and split: equal data, equal fingerprint."""
        digest = hashlib.sha256(repr((self.classes, tuple(self.images.shape))).encode())
        parts = [self.images, self.labels, *(self.splits[name] for name in sorted(self.splits))]
        for part in parts:
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @cached_property
    def stats(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, on the scale 0…1: the published ones, or of the training images."""
        if self.published_stats is not None:
            return self.published_stats
        pixels = self.images[self.splits["train"]].to(torch.float64) / 255
        std = pixels.std(dim=(0, 2, 3)).clamp_min(1e-3)  # one-coloured images are no reason to divide by 0
        return pixels.mean(dim=(0, 2, 3)).tolist(), std.tolist()

    @property
    def size(self) -> int:
        """Side of the (square) images in pixels."""
        return self.images.shape[-1]


class Split:
    """One part of an ImageData, as the dataset of a fastai DataLoader: item i is (TensorImage, TensorCategory)."""

    def __init__(self, data: ImageData, part: str):
        self.name, self.part, self.fingerprint = data.name, part, data.fingerprint
        self.index = data.splits[part]
        self.images, self.labels, self.vocab = data.images, data.labels, L(data.classes)
        self.split_idx = 0 if part == "train" else 1
        self.items = self.iloc = self  # fastai's Interpretation takes its worst images as `items.iloc[numbers]`

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i):
        if isinstance(i, list):
            part = copy(self)
            part.index, part.items, part.iloc = self.index[i], part, part
            return part
        i = self.index[i]
        return TensorImage(self.images[i]), TensorCategory(self.labels[i])

    def decode(self, item, full=True):
        """For `show_batch` and friends: the class name in place of its number."""
        image, label = item
        return image, _ClassName(self.vocab[int(label)])


class _ClassName(str):
    """A label that fastai can write above an image."""

    def show(self, ctx=None, **kwargs):
        ctx.set_title(str(self))
        return ctx


class Standardize(Transform):
    """Batches of bytes to floats of mean 0 and standard deviation 1 a channel; decoded, floats in 0…1 for showing.

    In place of fastai's IntToFloatTensor and Normalize. It takes the whole batch and plain tensors: dispatching on
    fastai's tensor types, and every operation on them, costs a small network's training as much as its forward does.
    """

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))

    def to(self, device):  # called by the DataLoader's device setter
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, batch, **kwargs):
        images, *rest = batch
        return images.float().div_(255).sub_(self.mean).div_(self.std), *rest

    def decode(self, batch, **kwargs):
        images, *rest = batch
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return (images * std + mean).clamp(0, 1), *rest


_RESIDENT = WeakTensorKeyDictionary()  # tensor -> {GPU: its copy there}, for as long as somebody holds the tensor


def resident(whole: Tensor, device: torch.device) -> Tensor:
    """A tensor's one copy on a GPU, where it takes at most a tenth of the GPU's memory; else the tensor itself."""
    if device.type != "cuda":
        return whole
    copies = _RESIDENT.setdefault(whole, {})
    if device not in copies:
        fits = whole.nbytes <= torch.cuda.get_device_properties(device).total_memory / 10
        copies[device] = whole.to(device) if fits else whole
    return copies[device]


class BatchDL(TfmdDL):
    """A DataLoader that cuts whole batches out of a Split's tensors instead of collating items one by one.

    Batches are plain tensors; fastai's types, which know how to show themselves, come back when one is decoded.
    """

    _n_inp, _types = 1, {tuple: [TensorImage, TensorCategory]}

    def __init__(self, dataset, bs=64, augment: Augment | None = None, num_workers=0, **kwargs):
        self.augment, self.share = augment, (0, 1)  # which of how many shares of every batch, see kdfast.experiment.distributed
        super().__init__(dataset, bs=bs, num_workers=num_workers, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls, **({"augment": self.augment} | kwargs))

    @property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel that `after_batch` makes 0 and 1."""
        return next((tfm.mean, tfm.std) for tfm in self.after_batch.fs if isinstance(tfm, Standardize))

    def __iter__(self):
        """Sets `shown` to the images' numbers in the data set, (B,), before each batch is handed out."""
        order: list[int] = []
        for i, batch in enumerate(super().__iter__()):
            order = order or self._DataLoader__idxs  # of this pass, whoever begins another within it
            self.shown = self.dataset.index[self._mine(order[i * self.bs : (i + 1) * self.bs])]
            yield batch

    def images(self, index: Tensor, view: int = 0) -> Tensor:
        """Images by their number in the data set (B,), in the view of that number, as a batch has them."""
        images = self._cut(self.dataset.images, index)
        if self.augment is not None:
            images = replace(self.augment, view=view)(images, index)
        return self.after_batch((images.to(self.device),))[0]

    def create_item(self, s):
        return s or 0  # an item is its number until the batch is cut

    def create_batch(self, numbers):
        index = self.dataset.index[self._mine(numbers)]
        images, labels = self._cut(self.dataset.images, index), self._cut(self.dataset.labels, index)
        return (images if self.augment is None else self.augment(images, index)), labels

    def _cut(self, whole: Tensor, index: Tensor) -> Tensor:
        """Rows of a tensor of the data set: on a GPU from its copy there, so that no step waits for them to come."""
        by_item = self.augment is not None and self.augment.randaugment  # made image by image, on the CPU
        device = torch.device("cpu" if by_item or self.fake_l.num_workers or self.device is None else self.device)
        whole = resident(whole, device)
        return whole[index.to(whole.device, non_blocking=True)]

    def _mine(self, numbers: list[int]) -> Tensor:
        first, step = self.share
        return torch.as_tensor(numbers[first::step])

    def retain(self, batch, numbers):
        return batch


def dataloaders(
    data: ImageData, batch_size: int, augment: str = "none", seed: int = 0, views: int = 0, device: str | None = None
) -> DataLoaders:
    """Train, validation and test DataLoaders (`dls[0]`, `dls[1]`, `dls[2]`) of normalised float images.

    `augment` names the changes made to training images (`kdfast.data.augment`); `seed` is theirs. With the callback
    `kdfast.training.learner.Views` every epoch draws a new view, or the next of `views`. `device` is fastai's default unless
    given. The last training batch is dropped where it is smaller than the others and not the only one.
    """
    train = Split(data, "train")
    device = torch.device(device) if device else default_device()
    options = {"after_batch": [Standardize(*data.stats)], "device": device}
    view = Augment.named(augment, data.size, seed, views)
    loaders = [BatchDL(train, bs=batch_size, shuffle=True, drop_last=len(train) > batch_size, augment=view, **options)]
    loaders += [BatchDL(Split(data, part), bs=max(batch_size, 256), **options) for part in ("valid", "test")]
    return DataLoaders(*loaders, path=".", device=device)
