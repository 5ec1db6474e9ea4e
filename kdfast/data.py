"""Images in memory, split once and for all, and the fastai DataLoaders that serve them.

A data set is decoded once into bytes (N, 3, H, W); batches are cut from it as tensors, so that a loader costs next to
nothing beside a training step of a small network.
"""

import hashlib
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import TensorImage, default_device
from fastai.vision.core import TensorCategory
from fastcore.foundation import L
from fasttransform import Transform
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from kdfast.augment import Augment
from kdfast.errors import KdfastError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
SPLIT_SEED = 0  # one split for every run of every study: runs differ by their training seed alone
VALID_FOLDERS = ("valid", "val", "validation")


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
        """Mean and standard deviation of each channel over the training images, on the scale 0…1."""
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


class BatchDL(TfmdDL):
    """A DataLoader that cuts whole batches out of a Split's tensors instead of collating items one by one.

    Batches are plain tensors; fastai's types, which know how to show themselves, come back when one is decoded.
    """

    _n_inp, _types = 1, {tuple: [TensorImage, TensorCategory]}

    def __init__(self, dataset, bs=64, augment: Augment | None = None, num_workers=0, **kwargs):
        self.augment = augment
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
            self.shown = self.dataset.index[torch.as_tensor(order[i * self.bs : (i + 1) * self.bs])]
            yield batch

    def images(self, index: Tensor, view: int = 0) -> Tensor:
        """Images by their number in the data set (B,), in the view of that number, as a batch has them."""
        images = self.dataset.images[index]
        if self.augment is not None:
            images = replace(self.augment, view=view)(images, index)
        return self.after_batch((images.to(self.device),))[0]

    def create_item(self, s):
        return s or 0  # an item is its number until the batch is cut

    def create_batch(self, numbers):
        index = self.dataset.index[torch.as_tensor(numbers)]
        images, labels = self.dataset.images[index], self.dataset.labels[index]
        return (images if self.augment is None else self.augment(images, index)), labels

    def retain(self, batch, numbers):
        return batch


def dataloaders(
    data: ImageData, batch_size: int, augment: str = "none", seed: int = 0, views: int = 0, device: str | None = None
) -> DataLoaders:
    """Train, validation and test DataLoaders (`dls[0]`, `dls[1]`, `dls[2]`) of normalised float images.

    `augment` names the changes made to training images (`kdfast.augment`); `seed` is theirs. With the callback
    `kdfast.training.Views` every epoch draws a new view, or the next of `views`. `device` is fastai's default unless
    given. The last training batch is dropped where it is smaller than the others and not the only one.
    """
    train = Split(data, "train")
    device = torch.device(device) if device else default_device()
    options = {"after_batch": [Standardize(*data.stats)], "device": device}
    view = Augment.named(augment, data.size, seed, views)
    loaders = [BatchDL(train, bs=batch_size, shuffle=True, drop_last=len(train) > batch_size, augment=view, **options)]
    loaders += [BatchDL(Split(data, part), bs=max(batch_size, 256), **options) for part in ("valid", "test")]
    return DataLoaders(*loaders, path=".", device=device)


def load_data(dataset: str, image_size: int = 0) -> ImageData:
    """The embedded data set `digits`, or a folder of images.

    A folder holds one sub-folder a class, or `train`/`valid`[/`test`] folders of such. Images are scaled to
    `image_size` pixels on their shorter side and cropped at the centre; 0 means the data set's own size (8 for
    digits, 64 for a folder). Raises KdfastError for a folder that cannot be trained on.
    """
    if dataset == "digits":
        return _digits(image_size or 8)
    root = Path(dataset).expanduser()
    if not root.is_dir():
        raise KdfastError(f"unknown data set {dataset!r}: give 'digits' or the path of a folder <folder>/<class>/*.jpg")
    return _folder(root, image_size or 64)


def is_folder(dataset: str) -> bool:
    """Whether `dataset` is the path of a folder rather than an embedded data set."""
    return dataset != "digits"


def _digits(size: int) -> ImageData:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 grey images of 8×8 pixels with values 0…16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    if size != 8:
        images = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear").round().byte()
    labels = torch.from_numpy(digits.target).long()
    splits = _split(labels, tuple("0123456789"), test=0.5, valid=0.2)
    files = tuple(f"digits/{i}" for i in range(len(labels)))
    rule = "half is the test set, a fifth of the rest the validation set, both stratified by class"
    return ImageData("digits", images, labels, tuple("0123456789"), files, splits, rule)


def _split(labels: Tensor, classes: tuple[str, ...], test: float, valid: float) -> dict[str, Tensor]:
    """Stratified and fixed: `test` of all images, then `valid` of the rest."""
    counts = torch.bincount(labels, minlength=len(classes))
    if counts.min() < 5:
        scarce = classes[int(counts.argmin())]
        raise KdfastError(f"class {scarce!r} has {int(counts.min())} images; a split into train, valid and test needs at least 5")
    rest, test_index = _stratified(np.arange(len(labels)), labels, test) if test else (np.arange(len(labels)), [])
    train, valid_index = _stratified(rest, labels, valid)
    parts = {"train": train, "valid": valid_index, "test": test_index}
    return {name: torch.as_tensor(np.sort(part), dtype=torch.int64) for name, part in parts.items()}


def _stratified(index: np.ndarray, labels: Tensor, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Two parts of `index`, the second of `fraction`, at least one image a class, in the classes' proportions."""
    target = labels[index].numpy()
    held_out = max(round(fraction * len(index)), len(np.unique(target)))
    return train_test_split(index, test_size=held_out, stratify=target, random_state=SPLIT_SEED)


def _folder(root: Path, size: int) -> ImageData:
    parts = {part: root / part for part in ("train", "test") if (root / part).is_dir()}
    valid = [root / name for name in VALID_FOLDERS if (root / name).is_dir()]
    if valid:
        parts["valid"] = valid[0]
    if "train" not in parts:
        parts = {"all": root}
    elif len(parts) == 1:
        raise KdfastError(f"{root} has a folder train but neither valid nor test: add one, or give {root / 'train'}")
    folders = {part: _class_folders(path) for part, path in parts.items()}
    classes = next(iter(folders.values())).keys()
    for part, found in folders.items():
        if found.keys() != classes:
            odd = ", ".join(sorted(found.keys() ^ classes)[:3])
            raise KdfastError(f"{parts[part]} has other classes than {next(iter(parts.values()))}: {odd}")
    files = [(part, c, file) for part in folders for c, name in enumerate(classes) for file in folders[part][name]]
    _check_memory(root, len(files), size)
    images = torch.stack([_read(file, size) for _, _, file in files])
    labels = torch.tensor([c for _, c, _ in files])
    splits, rule = _folder_splits(np.array([part for part, _, _ in files]), labels, tuple(classes))
    names = tuple(str(file.relative_to(root)) for _, _, file in files)
    return ImageData(root.resolve().name, images, labels, tuple(classes), names, splits, rule)


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """The images of each class, both in the order of their names."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {
        folder.name: sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS and f.is_file()) for folder in folders
    }
    if not any(found.values()):
        raise KdfastError(f"no images in {root}: expected {root}/<class>/*.jpg (or png, webp, …)")
    for name, files in found.items():
        if not files:
            raise KdfastError(f"class folder {root / name} has no images: fill it or remove it")
    if len(found) < 2:
        raise KdfastError(f"{root} has one class ({folders[0].name}): a classifier needs at least two class folders")
    return found


def _check_memory(root: Path, n: int, size: int) -> None:
    needed, free = 3 * n * size * size, psutil.virtual_memory().available
    if 2 * needed > free:
        raise KdfastError(
            f"{n} images of {root} at {size} pixels need {2 * needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} "
            "are free: choose a smaller image_size"
        )


def _read(file: Path, size: int) -> Tensor:
    """One image as uint8 (3, size, size): shorter side scaled to `size`, centre crop."""
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise KdfastError(f"cannot read image {file} ({error}): replace it or remove it") from None
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _folder_splits(part: np.ndarray, labels: Tensor, classes: tuple[str, ...]) -> tuple[dict[str, Tensor], str]:
    """The folder's own parts where it has all three; else the missing ones are cut, never the test set from training."""
    given = {name: torch.from_numpy(np.flatnonzero(part == name)) for name in set(part)}
    if "all" in given:
        return _split(labels, classes, test=0.2, valid=0.2), (
            "a fifth is the test set, a fifth of the rest the validation set, both stratified by class"
        )
    if len(given) == 3:
        return given, "the folder's own train, valid and test"
    test = given.get("test", given.get("valid"))
    cut = _split(labels[given["train"]], classes, test=0, valid=0.2)
    splits = {name: given["train"][cut[name]] for name in ("train", "valid")} | {"test": test}
    own = "test" if "test" in given else "valid"
    return splits, f"the folder's own {own} is the test set, a fifth of its train (stratified) the validation set"
