"""The data sets known by name: their true layouts, where they are looked for, and what is said of damaged ones."""

import functools
import http.server
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from kdfast.core.errors import KdfastError
from kdfast.data import datasets, decoding
from kdfast.data.datasets import WEATHER, load_data
from kdfast.data.splits import HoldOut

BREEDS = ("Abyssinian", "american_bulldog", "Egyptian_Mau", "yorkshire_terrier")
WNIDS = ("n01440764", "n02102040", "n02979186")


def picture(file: Path, colour: int, size: tuple[int, int] = (12, 12)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(file)


def make_cifar100(root: Path) -> Path:
    """fastai's layout: two superclasses of two classes."""
    for part, n in {"train": 10, "test": 4}.items():
        for superclass, classes in {"fish": ("shark", "trout"), "trees": ("maple", "oak")}.items():
            write_images(root / part / superclass, dict.fromkeys(classes, n), size=32)
    return root


def make_imagenette(root: Path) -> Path:
    for part, n in {"train": 10, "val": 4}.items():
        for c, wnid in enumerate(WNIDS):
            for i in range(n):
                picture(root / part / wnid / f"{wnid}_{i}.JPEG", 40 * c + i, (20, 16))
    (root / "noisy_imagenette.csv").write_text("path,noisy_labels_0\n")
    return root


def make_pets(root: Path) -> Path:
    """The official lists' format, and the .mat files that lie among the images."""
    (root / "annotations").mkdir(parents=True)
    for part, numbers in {"trainval": range(10), "test": range(10, 14)}.items():
        lines = []
        for c, breed in enumerate(BREEDS):
            for i in numbers:
                picture(root / "images" / f"{breed}_{i}.jpg", 40 * c + i, (30, 20))
                lines.append(f"{breed}_{i} {c + 1} {1 + breed.islower()} {c + 1}")
        (root / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    (root / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB")
    return root


def make_weather(root: Path) -> Path:
    return write_images(root / "dataset", dict.fromkeys(WEATHER, 10)).parent


MAKERS = {
    "cifar100": ("cifar100", make_cifar100),
    "imagenette": ("imagenette2-160", make_imagenette),
    "pets": ("oxford-iiit-pet", make_pets),
    "weather": ("weather", make_weather),
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """Make a data set in KDFAST_DATA; returns its folder."""
    monkeypatch.setenv("KDFAST_DATA", str(tmp_path / "data"))

    def make(dataset: str) -> Path:
        folder, maker = MAKERS[dataset]
        return maker(tmp_path / "data" / folder)

    return make


def sizes(data):
    return {part: len(index) for part, index in data.splits.items()}


@pytest.mark.parametrize(
    ("dataset", "classes", "parts"),
    [
        ("cifar100", ("maple", "oak", "shark", "trout"), {"train": 40, "valid": 16, "test": 16}),
        ("imagenette", WNIDS, {"train": 24, "valid": 6, "test": 12}),
        ("pets", tuple(sorted(BREEDS)), {"train": 32, "valid": 8, "test": 16}),
        ("weather", WEATHER, {"train": 77, "valid": 22, "test": 11}),
    ],
)
def test_a_named_data_set_is_read_from_its_true_layout(there, dataset, classes, parts):
    folder = there(dataset)
    data = load_data(dataset, 16)
    assert (data.name, data.source, data.classes, sizes(data)) == (dataset, folder.name, classes, parts)
    assert data.images.shape == (len(data.files), 3, 16, 16)


def test_all_of_cifar100_trains_and_its_test_set_stands_in_for_validation(there):
    there("cifar100")
    data = load_data("cifar100")
    assert torch.equal(data.splits["valid"], data.splits["test"]) and "nothing is chosen by it" in data.split_rule
    assert data.stats[0] == [0.5071, 0.4867, 0.4408]
    held_out = load_data("cifar100", hold_out=HoldOut(0.25))
    assert sizes(held_out) == {"train": 30, "valid": 10, "test": 16}


def test_the_parts_of_pets_are_the_official_lists(there):
    there("pets")
    data = load_data("pets", 16)
    numbers = {part: {int(data.files[i].rsplit("_", 1)[1][:-4]) for i in index} for part, index in data.splits.items()}
    assert numbers["test"] == set(range(10, 14)) and numbers["train"] | numbers["valid"] == set(range(10))


def test_pets_are_scaled_to_256_and_cropped_to_224(there):
    there("pets")
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:16] = 255  # what the crop cuts off
    Image.fromarray(stripes).save(datasets.find("pets") / "images" / "Abyssinian_0.jpg", quality=100, subsampling=0)
    data = load_data("pets")
    assert data.size == 224 and data.images[data.files.index("images/Abyssinian_0.jpg")].float().mean() < 1


def test_folds_hold_out_every_training_image_once_and_never_a_test_image(there):
    there("imagenette")
    folds = [load_data("imagenette", 16, HoldOut(folds=5, fold=i)) for i in range(5)]
    held_out = torch.cat([data.splits["valid"] for data in folds])
    assert sorted(held_out.tolist()) == sorted(torch.cat([folds[0].splits[p] for p in ("train", "valid")]).tolist())
    assert all(torch.equal(data.splits["test"], folds[0].splits["test"]) for data in folds)
    assert all(torch.bincount(data.labels[data.splits["valid"]]).tolist() == [2, 2, 2] for data in folds)


# Damage


def without(*folders):
    return lambda root: [shutil.rmtree(root / folder) for folder in folders]


def unreadable(name):
    return lambda root: (root / name).write_bytes(b"<html>404</html>")


def missing(name):
    return lambda root: (root / name).unlink()


def listed_twice(root):
    (root / "annotations" / "test.txt").open("a").write("Abyssinian_0 1 1 1\n")


def hostile_list(root):
    (root / "annotations" / "test.txt").open("a").write("../../secret_1 1 1 1\n")


@pytest.mark.parametrize(
    ("dataset", "damage", "said"),
    [
        ("cifar100", without("test"), "is not the data set cifar100: it has no folder test"),
        ("cifar100", without("test/fish/shark"), "test has other classes than train: shark"),
        ("cifar100", unreadable("train/trees/oak/001.png"), "cannot read image .*oak/001.png"),
        ("cifar100", without("train/fish", "train/trees"), "no images of two classes in .*train"),
        ("imagenette", without("val"), "is not the data set imagenette: it has no folder val"),
        ("imagenette", without(f"train/{WNIDS[0]}"), f"other classes than train: {WNIDS[0]}"),
        ("imagenette", unreadable(f"val/{WNIDS[1]}/{WNIDS[1]}_0.JPEG"), "cannot read image"),
        ("pets", without("annotations"), "is not the data set pets: it has no folder annotations"),
        ("pets", missing("annotations/test.txt"), "pets has no list .*test.txt"),
        ("pets", missing("images/Egyptian_Mau_3.jpg"), "image .*Egyptian_Mau_3.jpg is missing"),
        ("pets", unreadable("images/Egyptian_Mau_3.jpg"), "cannot read image .*Egyptian_Mau_3.jpg"),
        ("pets", listed_twice, "lists Abyssinian_0 in trainval.txt and test.txt"),
        ("pets", hostile_list, "lists '../../secret_1', which is no"),
        ("weather", without("dataset/hail"), "is not the data set weather: it has no class folder hail"),
        ("weather", unreadable("dataset/dew/000.png"), "cannot read image .*dew/000.png"),
    ],
)
def test_a_damaged_data_set_is_refused_in_one_sentence(there, dataset, damage, said):
    damage(there(dataset))
    with pytest.raises(KdfastError, match=said) as error:
        load_data(dataset, 16)
    assert "\n" not in str(error.value)


# Where they are


def test_a_data_set_that_must_be_fetched_by_hand_says_from_where_and_to_where(tmp_path, monkeypatch):
    monkeypatch.setenv("KDFAST_DATA", str(tmp_path))
    with pytest.raises(KdfastError, match=f"kaggle.com/.*put it into {tmp_path}/weather"):
        load_data("weather")


def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KDFAST_DATA", str(tmp_path))
    monkeypatch.setitem(
        datasets.SOURCES, "cifar100", replace(datasets.SOURCES["cifar100"], url="http://127.0.0.1:9/cifar100.tgz")
    )
    with pytest.raises(KdfastError, match=r"cifar100 could not be downloaded \(.*refused.*\): unpack http") as error:
        load_data("cifar100")
    assert "\n" not in str(error.value) and not (tmp_path / "cifar100").exists()


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Offers tmp_path/web/cifar100.tgz for download into tmp_path/data; the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/cifar100.tgz"
    monkeypatch.setitem(datasets.SOURCES, "cifar100", replace(datasets.SOURCES["cifar100"], url=url))
    monkeypatch.setenv("KDFAST_DATA", str(tmp_path / "data"))
    yield asked
    server.shutdown()


def test_a_data_set_that_is_nowhere_is_downloaded_once(tmp_path, offered):
    make_cifar100(tmp_path / "web" / "cifar100")
    with tarfile.open(tmp_path / "web" / "cifar100.tgz", "w:gz") as archive:
        archive.add(tmp_path / "web" / "cifar100", "cifar100")
    first, second = load_data("cifar100"), load_data("cifar100")
    assert first.fingerprint == second.fingerprint and sizes(first)["train"] == 40
    assert offered == ["/cifar100.tgz"] and (tmp_path / "data" / "cifar100").is_dir()


def link(to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("cifar100/link")
    member.type, member.linkname = tarfile.SYMTYPE, to
    return member


@pytest.mark.parametrize(
    "member", [tarfile.TarInfo("../evil.txt"), tarfile.TarInfo("cifar100/../../../evil.txt"), link("../../..")]
)
def test_an_archive_that_would_leave_its_folder_is_refused(tmp_path, offered, member):
    make_cifar100(tmp_path / "web" / "cifar100")
    with tarfile.open(tmp_path / "web" / "cifar100.tgz", "w:gz") as archive:
        archive.add(tmp_path / "web" / "cifar100", "cifar100")
        archive.addfile(member)
    with pytest.raises(KdfastError, match=r"could not be downloaded .*outside the destination"):
        load_data("cifar100")
    assert not list(tmp_path.rglob("evil.txt")) and not (tmp_path / "data" / "cifar100").exists()


# Decoded once


@pytest.fixture
def kept(tmp_path, monkeypatch, image_folder):
    monkeypatch.setattr(decoding, "WORTH_KEEPING", 1)
    monkeypatch.setenv("KDFAST_DECODED", str(tmp_path / "decoded"))
    return sorted(image_folder.rglob("*.png")), tmp_path / "decoded"


def test_decoded_images_are_kept_until_a_file_changes(kept, monkeypatch):
    files, folder = kept
    fresh = decoding.read_images(files, 8)
    decode, decoded = decoding._read, []
    monkeypatch.setattr(decoding, "_read", lambda *args: decoded.append(args[0]) or decode(*args))
    assert torch.equal(decoding.read_images(files, 8), fresh) and not decoded
    picture(files[3], 9)
    assert (decoding.read_images(files, 8)[3] == 9).all() and len(decoded) == len(files)
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_or_unwritable_copy_of_decoded_images_costs_nothing_but_time(kept, monkeypatch):
    files, folder = kept
    fresh = decoding.read_images(files, 8)
    (copy,) = folder.iterdir()
    copy.write_bytes(copy.read_bytes()[:100])
    assert torch.equal(decoding.read_images(files, 8), fresh)
    monkeypatch.setenv("KDFAST_DECODED", str(files[0]))  # a file, not a folder
    assert torch.equal(decoding.read_images(files, 8), fresh)
