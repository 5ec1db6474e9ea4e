"""Data sets by name or folder, each read into an ImageData.

A named one is looked for in `KDFAST_DATA` and in fastai's data folder, and downloaded there by fastai's `untar_data` (size and
hash checked, once, with a bar) where it is in neither.
"""

import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarFile

import numpy as np
import torch
from fastai.data.external import URLs, fastai_cfg, untar_data
from torch import Tensor

from kdfast.core.defaults import NAMED, usual
from kdfast.core.errors import KdfastError, unknown
from kdfast.data.decoding import EXTENSIONS, read_images
from kdfast.data.loaders import ImageData
from kdfast.data.splits import HoldOut, cut, given, parts

VALID_FOLDERS = ("valid", "val", "validation")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean, std of each channel: what ImageNet weights were trained on
CIFAR100 = ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])  # of the published tables
Classes = dict[str, list[Path]]  # class name -> its images


def load_data(dataset: str, image_size: int = 0, hold_out: HoldOut | None = None) -> ImageData:
    """A data set by its name (`kdfast.core.defaults.NAMED`), or a folder of images by its path.

    A folder holds one sub-folder a class, or `train`/`valid`[/`test`] folders of such. Images are scaled by their shorter
    side and cropped at the centre to `image_size` pixels; 0 means the data set's usual, as None does for `hold_out`. Raises
    KdfastError for what cannot be trained on, in one sentence.
    """
    own = usual(dataset)
    size, hold_out = image_size or own.image_size, hold_out or HoldOut(own.valid_pct)
    resize = round(size / own.crop)
    if dataset == "digits":
        return _digits(size, hold_out)
    if dataset in SOURCES:
        return SOURCES[dataset].read(find(dataset), size, resize, hold_out)
    root = Path(dataset).expanduser()
    if not root.is_dir():
        if os.sep in dataset:
            raise KdfastError(f"no folder {dataset}: give the path of a folder <folder>/<class>/*.jpg")
        raise unknown("data set", dataset, NAMED, "the data sets known by name, nor a folder here")
    return _folder(root, size, resize, hold_out)


# Where the named ones are


@dataclass(frozen=True)
class Source:
    """Where a named data set comes from."""

    folders: tuple[str, ...]  # under which it may lie in the data folder
    read: Callable[[Path, int, int, HoldOut], ImageData]
    url: str = ""  # for untar_data
    manual: str = ""  # what to do where it cannot be downloaded


def data_folders() -> list[Path]:
    """Where named data sets are looked for: `KDFAST_DATA` if set, then fastai's own data folder."""
    own = os.environ.get("KDFAST_DATA")
    return [*([Path(own).expanduser()] if own else []), Path(fastai_cfg().path("data"))]


def find(dataset: str) -> Path:
    """The folder of a named data set, downloaded now if it is nowhere; a KdfastError says what to do where that fails."""
    source = SOURCES[dataset]
    places = [folder / name for folder in data_folders() for name in source.folders]
    for place in places:
        if place.is_dir():
            return place
    put = f"put it into {places[0]} (KDFAST_DATA names another folder)"
    if not source.url:
        raise KdfastError(f"data set {dataset} is not in {places[0]}: {source.manual}, and {put}")
    own = os.environ.get("KDFAST_DATA")
    target = {"data": data_folders()[0], "archive": data_folders()[0] / "archive"} if own else {}
    try:
        with _unpacking(data_folders()[0]):
            return Path(untar_data(source.url, **target))
    except Exception as error:  # fastdownload's own errors are bare Exceptions
        why = " ".join(str(error).split()) or type(error).__name__
        raise KdfastError(f"data set {dataset} could not be downloaded ({why}): unpack {source.url}, and {put}") from None


@contextmanager
def _unpacking(folder: Path) -> Iterator[None]:
    """What untar_data unpacks meanwhile stays in its folder (by default, Python 3.11 does whatever a tar file says) and comes to
    `folder` whole or not at all: unpacked on the same disk, its move is one step. fastai's own folders stay as they were."""
    if not hasattr(tarfile, "data_filter"):
        raise KdfastError(
            f"Python {sys.version.split()[0]} unpacks whatever an archive says, 3.11.4 is the first that can be told not to"
        )
    folder.mkdir(parents=True, exist_ok=True)
    own, filtered, scratch = fastai_cfg(), TarFile.extraction_filter, tempfile.tempdir
    places = {key: own[key] for key in ("data", "archive")}
    TarFile.extraction_filter, tempfile.tempdir = staticmethod(tarfile.data_filter), str(folder)
    try:
        yield
    finally:
        TarFile.extraction_filter, tempfile.tempdir = filtered, scratch
        for key, place in places.items():
            own[key] = place


# How they are read


def _digits(size: int, hold_out: HoldOut) -> ImageData:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 grey images of 8×8 pixels with values 0…16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    if size != 8:
        images = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear").round().byte()
    labels = torch.from_numpy(digits.target).long()
    splits, rule = cut(labels, tuple("0123456789"), test=0.5, hold_out=hold_out)
    files = tuple(f"digits/{i}" for i in range(len(labels)))
    return ImageData("digits", images, labels, tuple("0123456789"), files, splits, rule)


def _folder(root: Path, size: int, resize: int, hold_out: HoldOut) -> ImageData:
    """Any folder of class folders, with or without parts."""
    found = _parts(root)
    if found is None:
        images, labels, classes, files = _read(root, _by_folder(root), size, resize)
        splits, rule = cut(labels, classes, test=0.2, hold_out=hold_out)
    else:
        classed = {name: _by_folder(path) for name, path in found.items()}
        images, labels, classes, files, part = _read_parts(root, classed, size, resize)
        splits, rule = given(part, labels, hold_out)
    return ImageData(root.resolve().name, images, labels, classes, files, splits, rule)


def _cifar100(root: Path, size: int, resize: int, hold_out: HoldOut) -> ImageData:
    """fastai's copy, `{train,test}/<superclass>/<class>/*.png`, or one without the superclasses."""
    _need(root, "cifar100", "train", "test")
    found = {part: _by_parent(root / part) for part in ("train", "test")}
    images, labels, classes, files, part = _read_parts(root, found, size, resize)
    splits, rule = given(part, labels, hold_out)
    return ImageData("cifar100", images, labels, classes, files, splits, rule, root.name, CIFAR100)


def _imagenette(root: Path, size: int, resize: int, hold_out: HoldOut) -> ImageData:
    """`{train,val}/<wnid>/*.JPEG`; its val is the test set."""
    _need(root, "imagenette", "train", "val")
    found = {"train": _by_folder(root / "train"), "valid": _by_folder(root / "val")}
    images, labels, classes, files, part = _read_parts(root, found, size, resize)
    splits, rule = given(part, labels, hold_out)
    return ImageData("imagenette", images, labels, classes, files, splits, rule, root.name, IMAGENET)


def _pets(root: Path, size: int, resize: int, hold_out: HoldOut) -> ImageData:
    """`images/<Breed>_<n>.jpg`, and the official lists `annotations/{trainval,test}.txt` of names and numbers."""
    _need(root, "pets", "images", "annotations")
    listed = {part: _pets_list(root, part) for part in ("trainval", "test")}
    twice = set(listed["trainval"]) & set(listed["test"])
    if twice:
        raise KdfastError(f"{root / 'annotations'} lists {min(twice)} in trainval.txt and test.txt: restore the official lists")
    found = {part: _by_class((root / "images" / f"{name}.jpg" for name in names), _breed) for part, names in listed.items()}
    images, labels, classes, files, part = _read_parts(root, found, size, resize)
    train, valid, rule = hold_out(np.flatnonzero(part == "trainval"), labels, np.flatnonzero(part == "test"))
    splits = parts(train, valid, np.flatnonzero(part == "test"))
    return ImageData("pets", images, labels, classes, files, splits, f"the official test set, {rule}", root.name, IMAGENET)


def _pets_list(root: Path, part: str) -> list[str]:
    """Names of the images; a line is `<name> <class> <species> <breed>`."""
    path = root / "annotations" / f"{part}.txt"
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise KdfastError(f"pets has no list {path}: unpack annotations.tar.gz beside images") from None
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    for name in names:
        if "_" not in name or Path(name).name != name:
            raise KdfastError(f"{path} lists {name!r}, which is no <Breed>_<number>: restore the official list")
    return names


def _breed(file: Path) -> str:
    return file.stem.rsplit("_", 1)[0]


WEATHER = ("dew", "fogsmog", "frost", "glaze", "hail", "lightning", "rain", "rainbow", "rime", "sandstorm", "snow")


def _weather(root: Path, size: int, resize: int, hold_out: HoldOut) -> ImageData:
    """`[dataset/]<class>/*.jpg` with 11 classes, split 70/20/10."""
    inner = root / "dataset" if (root / "dataset").is_dir() else root
    found = _by_folder(inner)
    if tuple(found) != WEATHER:
        odd = sorted(set(found) ^ set(WEATHER))[0]
        what = "no" if odd in WEATHER else "another"
        raise KdfastError(f"{inner} is not the data set weather: it has {what} class folder {odd}; unpack it anew")
    images, labels, classes, files = _read(inner, found, size, resize)
    splits, rule = cut(labels, classes, test=0.1, hold_out=hold_out)
    return ImageData("weather", images, labels, classes, files, splits, rule, root.name, IMAGENET)


SOURCES = {
    "cifar100": Source(("cifar100",), _cifar100, URLs.CIFAR_100),
    "imagenette": Source(("imagenette", "imagenette2-160", "imagenette2", "imagenette128"), _imagenette, URLs.IMAGENETTE_160),
    "pets": Source(("oxford-iiit-pet", "pets"), _pets, URLs.PETS),
    "weather": Source(
        ("weather", "weather-dataset"),
        _weather,
        manual="download it by hand from https://www.kaggle.com/datasets/jehanbhathena/weather-dataset (with an account)",
    ),
}  # fmt: skip


# Files by class


def _parts(root: Path) -> dict[str, Path] | None:
    """The folders train, valid and test of a folder; None if it has no train."""
    found = {part: root / part for part in ("train", "test") if (root / part).is_dir()}
    valid = [root / name for name in VALID_FOLDERS if (root / name).is_dir()]
    if valid:
        found["valid"] = valid[0]
    if "train" not in found:
        return None
    if len(found) == 1:
        raise KdfastError(f"{root} has a folder train but neither valid nor test: add one, or give {root / 'train'}")
    return found


def _need(root: Path, dataset: str, *folders: str) -> None:
    for folder in folders:
        if not (root / folder).is_dir():
            raise KdfastError(f"{root} is not the data set {dataset}: it has no folder {folder}; unpack it anew")


def _by_folder(root: Path) -> Classes:
    """The images of each class folder, both in the order of their names."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {folder.name: sorted(_images(folder)) for folder in folders}
    if not any(found.values()):
        raise KdfastError(f"no images in {root}: expected {root}/<class>/*.jpg (or png, webp, …)")
    for name, files in found.items():
        if not files:
            raise KdfastError(f"class folder {root / name} has no images: fill it or remove it")
    if len(found) < 2:
        raise KdfastError(f"{root} has one class ({folders[0].name}): a classifier needs at least two class folders")
    return found


def _by_parent(root: Path) -> Classes:
    """The class of an image is the folder in which it lies, however deep."""
    found = _by_class(sorted(_images(root)), lambda file: file.parent.name)
    if len(found) < 2:
        raise KdfastError(f"no images of two classes in {root}: expected {root}/[<superclass>/]<class>/*.png")
    return found


def _by_class(files: Iterable[Path], name: Callable[[Path], str]) -> Classes:
    found: Classes = {}
    for file in files:
        found.setdefault(name(file), []).append(file)
    return dict(sorted(found.items()))


def _images(folder: Path) -> Iterable[Path]:
    return (f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS and f.is_file())


Read = tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]  # images, labels, classes, files


def _read(root: Path, found: Classes, size: int, resize: int) -> Read:
    files = [(c, file) for c, name in enumerate(found) for file in found[name]]
    images = read_images([file for _, file in files], size, resize)
    labels = torch.tensor([c for c, _ in files])
    return images, labels, tuple(found), tuple(str(file.relative_to(root)) for _, file in files)


def _read_parts(root: Path, found: dict[str, Classes], size: int, resize: int) -> tuple[*Read, np.ndarray]:
    """The same of a data set in parts, and the name of each image's part (N,)."""
    first = next(iter(found))
    for part, classes in found.items():
        if classes.keys() != found[first].keys():
            odd = ", ".join(sorted(classes.keys() ^ found[first].keys())[:3])
            raise KdfastError(f"{root}: {part} has other classes than {first}: {odd}")
    classes = list(found[first])
    files = [(part, c, file) for part in found for c, name in enumerate(classes) for file in found[part][name]]
    images = read_images([file for _, _, file in files], size, resize)
    labels = torch.tensor([c for _, c, _ in files])
    names = tuple(str(file.relative_to(root)) for _, _, file in files)
    return images, labels, tuple(classes), names, np.array([part for part, _, _ in files])
