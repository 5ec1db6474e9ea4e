"""Data sets, their splits, and what is said about folders that cannot be trained on."""

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from kdfast.core.errors import KdfastError
from kdfast.data.augment import Augment, uniform
from kdfast.data.datasets import load_data
from kdfast.data.loaders import dataloaders


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_half_of_the_digits_are_the_test_set_and_the_parts_are_disjoint(digits):
    sizes = {part: len(index) for part, index in digits.splits.items()}
    assert sizes == {"train": 719, "valid": 180, "test": 898}
    assert len(torch.cat(list(digits.splits.values())).unique()) == 1797


def test_the_split_is_stratified(digits):
    share = torch.bincount(digits.labels).double() / len(digits.labels)
    for index in digits.splits.values():
        part = torch.bincount(digits.labels[index], minlength=10).double() / len(index)
        assert (part - share).abs().max() < 0.01


def test_the_fingerprint_sees_a_single_changed_pixel_label_or_split(digits):
    from dataclasses import replace

    images, labels, splits = digits.images.clone(), digits.labels.clone(), dict(digits.splits)
    images[5, 0, 3, 3] += 1
    labels[0] = (labels[0] + 1) % 10
    splits["train"], splits["valid"] = splits["train"][1:], torch.cat([splits["valid"], splits["train"][:1]])
    changed = [replace(digits, images=images), replace(digits, labels=labels), replace(digits, splits=splits)]
    assert len({digits.fingerprint, *(d.fingerprint for d in changed)}) == 4
    assert load_data("digits").fingerprint == digits.fingerprint


def test_training_batches_are_normalised_by_the_training_images(digits):
    dls = dataloaders(digits, 64)
    pixels = torch.cat([x.as_subclass(torch.Tensor) for x, _ in dls.train.new(shuffle=False, drop_last=False)])
    assert len(pixels) == 719
    assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3


def test_batches_hold_the_images_and_labels_of_their_split(digits):
    x, y = dataloaders(digits, 64)[2].one_batch()
    index = digits.splits["test"][: len(y)]
    mean, std = (torch.tensor(v)[:, None, None] for v in digits.stats)
    expected = (digits.images[index].float() / 255 - mean) / std
    assert torch.allclose(x.as_subclass(torch.Tensor), expected, atol=1e-5)
    assert y.tolist() == digits.labels[index].tolist()


def test_shown_images_have_their_own_colours_and_class_names(digits):
    dls = dataloaders(digits, 64)
    batch = dls.valid.one_batch()
    x, _, items = dls.valid._pre_show_batch(batch)
    raw = digits.images[digits.splits["valid"][:4]].float() / 255
    assert torch.allclose(x[:4].as_subclass(torch.Tensor), raw, atol=1e-5)
    assert [str(label) for _, label in items[:4]] == [str(int(y)) for y in batch[1][:4]]


def test_a_folder_of_classes_is_split_in_three(image_folder):
    data = load_data(str(image_folder), 8)
    assert data.classes == ("apple", "kiwi", "plum")
    assert {part: len(index) for part, index in data.splits.items()} == {"train": 38, "valid": 10, "test": 12}
    assert data.images.shape == (60, 3, 8, 8)


def test_train_valid_and_test_folders_are_taken_as_they_are(tmp_path):
    for part, n in {"train": 9, "valid": 4, "test": 5}.items():
        write_images(tmp_path / part, {"a": n, "b": n})
    data = load_data(str(tmp_path), 8)
    assert {part: len(index) for part, index in data.splits.items()} == {"train": 18, "valid": 8, "test": 10}
    assert all(data.files[i].startswith("valid/") for i in data.splits["valid"])


def test_without_a_test_folder_the_valid_folder_is_the_test_set_and_train_is_cut(tmp_path):
    for part, n in {"train": 10, "val": 5}.items():
        write_images(tmp_path / part, {"a": n, "b": n})
    data = load_data(str(tmp_path), 8)
    assert all(data.files[i].startswith("val/") for i in data.splits["test"])
    assert all(data.files[i].startswith("train/") for part in ("train", "valid") for i in data.splits[part])
    assert len(data.splits["valid"]) == 4
    assert "valid is the test set" in data.split_rule


def truncated(folder):
    file = folder / "apple" / "003.png"
    file.write_bytes(file.read_bytes()[:100])


def emptied(folder):
    for file in (folder / "kiwi").iterdir():
        file.unlink()


def one_class(folder):
    import shutil

    shutil.rmtree(folder / "kiwi")
    shutil.rmtree(folder / "plum")


def scarce(folder):
    for file in sorted((folder / "plum").iterdir())[3:]:
        file.unlink()


def no_images(folder):
    one_class(folder)
    for file in (folder / "apple").iterdir():
        file.rename(file.with_suffix(".txt"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, r"cannot read image .*apple/003.png"),
        (emptied, r"class folder .*kiwi has no images"),
        (one_class, r"has one class \(apple\)"),
        (scarce, r"class 'plum' has 3 images.*at least 5"),
        (no_images, r"no images in .*fruit"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_sentence(image_folder, damage, said):
    damage(image_folder)
    with pytest.raises(KdfastError, match=said) as error:
        load_data(str(image_folder), 8)
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(KdfastError, match="unknown data set 'digit'"):
        load_data("digit")


def test_grey_palette_and_transparent_images_are_read_as_rgb(tmp_path):
    write_images(tmp_path, {"a": 6, "b": 6})
    grey = np.full((12, 12), 77, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a" / "grey.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "a" / "palette.gif")
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "a" / "rgba.png")
    data = load_data(str(tmp_path), 8)
    index = data.files.index("a/grey.png")
    assert data.images.shape[1] == 3 and (data.images[index] == 77).all()


def test_views_depend_on_seed_view_and_image_alone():
    images, index = torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8).float(), torch.tensor([3, 1, 7, 5])
    whole = Augment.named("crop+flip", 8, seed=1)(images, index)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(Augment.named("crop+flip", 8, seed=1)(images[order], index[order]), whole[order])
    other_view = Augment.named("crop+flip", 8, seed=1)
    other_view.view = 1
    many, numbers = images.repeat(8, 1, 1, 1), torch.arange(32)
    assert not torch.equal(other_view(many, numbers), Augment.named("crop+flip", 8, seed=1)(many, numbers))


def test_draws_are_uniform_and_independent():
    draws = uniform(seed=3, view=5, index=np.arange(20000), draws=2)
    counts = np.histogram2d(draws[:, 0], draws[:, 1], bins=10, range=[[0, 1], [0, 1]])[0]
    assert ((counts - 200) ** 2 / 200).sum() < 150  # chi-square with 99 degrees of freedom: 150 is p = 0.0007


def test_a_crop_is_a_window_of_the_padded_image():
    image = torch.arange(1, 1 + 16 * 16).reshape(1, 1, 16, 16)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = [padded[0, 0, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    augment = Augment.named("crop", 16, seed=0)
    for number in range(10):
        view = augment(image, torch.tensor([number]))[0, 0]
        assert any(torch.equal(view, window) for window in windows)


def shown(dls, epochs=2):
    """Pixels, labels and image numbers of some epochs' batches."""
    seen = []
    for epoch in range(epochs):
        dls.train.augment.view = dls.train.augment.of_epoch(epoch)
        for x, y in dls.train:
            seen.append((x, y, dls.train.shown))
    return seen


def test_batches_are_the_same_whatever_the_number_of_workers(digits):
    def batches(workers):
        dls = dataloaders(digits, 64, "crop+flip", seed=3)
        train = dls.train.new(num_workers=workers)
        train.rng.seed(7)
        dls.loaders[0] = train
        return shown(dls)

    here, elsewhere = batches(0), batches(2)
    assert len(here) == 22
    for (x, y, numbers), (other_x, other_y, other_numbers) in zip(here, elsewhere, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y) and torch.equal(numbers, other_numbers)


def test_a_batchs_images_are_known_by_number_and_can_be_shown_again(digits):
    dls = dataloaders(digits, 64, "crop+flip", seed=3)
    for epoch, (x, y, numbers) in zip([0] * 11 + [1] * 11, shown(dls), strict=True):
        assert torch.equal(digits.labels[numbers], y)
        assert torch.equal(dls.train.images(numbers, view=epoch), x)


def test_numbers_stay_right_when_another_pass_begins_within_one(digits):
    dls = dataloaders(digits, 64)
    for _, y in dls.train:
        assert torch.equal(digits.labels[dls.train.shown], y)
        dls.train.one_batch()


def test_recycled_views_come_round_again():
    augment = Augment.named("crop", 8, seed=0, views=3)
    assert [augment.of_epoch(e) for e in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [Augment.named("crop", 8, seed=0).of_epoch(e) for e in (0, 5)] == [0, 5]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", ["none", "crop+flip", "randaugment"])
def test_a_gpu_cuts_the_batches_that_a_cpu_cuts(augment):
    data, index = load_data("digits"), torch.tensor([5, 700, 3])
    here, there = (dataloaders(data, 64, augment, device=device).train for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.images(index, view=3).cpu(), here.images(index, view=3))
    assert there.one_batch()[0].device.type == there.one_batch()[1].device.type == "cuda"
