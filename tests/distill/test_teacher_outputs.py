"""Cached teacher_outputs is the teacher's: bit for bit, whatever was stored before, whoever else computes, whatever fails."""

import subprocess
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from conftest import finish, write_images
from fastai.callback.mixup import CutMix, MixUp
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.data import ImageDataLoaders

from kdfast.all import (
    AT,
    CC,
    DKD,
    KD,
    RKD,
    Cached,
    Distill,
    Experiment,
    KdfastError,
    Teacher,
    Views,
    create_model,
    dataloaders,
    load_data,
    set_seed,
)
from kdfast.distill.teacher_outputs import CachedOutputs

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(str(write_images(tmp_path_factory.mktemp("images") / "fruit", {"apple": 20, "kiwi": 20, "plum": 20})), 32)


def network(name, seed=1, size=32):
    torch.manual_seed(seed)
    return create_model(name, 3, size)


def trained(data, teacher, method, cached=None, cbs=(), epochs=3, views=0, batch_size=16):
    """A student's weights after a whole training with a teacher that is live or stored, and its Learner."""
    set_seed(0)
    student = create_model("mini_resnet_xs", 3, data.size)
    dls = dataloaders(data, batch_size, "crop+flip", seed=5, views=views)
    distill = Distill(teacher, method, cached=cached)
    learn = Learner(dls, student, CrossEntropyLossFlat(), cbs=[Views(), distill, *cbs])
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2)
    return {k: v.clone() for k, v in student.state_dict().items()}, learn


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "vit_b_16", "mini_vit_s"])
def test_stored_float32_and_live_train_the_same_student_bit_for_bit(data, tmp_path, name):
    teacher = Teacher(network(name), chunk=16)
    live, _ = trained(data, teacher, KD(), epochs=2)
    stored, learn = trained(data, teacher, KD(), Cached(tmp_path, "float32"), epochs=2)
    again, reader = trained(data, teacher, KD(), Cached(tmp_path, "float32"), epochs=2)
    assert equal(live, stored) and equal(live, again)
    assert learn.distill.teacher_s > 0 and reader.distill.teacher_s == 0


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "vit_b_16"])
def test_an_image_has_the_same_logits_in_whatever_batch_it_comes(name):
    teacher = Teacher(network(name), chunk=16)
    x = torch.randn(20, 3, 32, 32)
    whole = teacher.outputs((x,)).logits
    order = torch.randperm(20)
    assert whole.shape == (20, 3)
    assert torch.equal(teacher.outputs((x[:3],)).logits, whole[:3])
    assert torch.equal(teacher.outputs((x[order],)).logits, whole[order])


@pytest.mark.parametrize("dtype, error", [("float32", 0), ("float16", 2**-11)])
def test_stored_logits_and_features_are_the_live_ones_up_to_rounding(data, tmp_path, dtype, error):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    loader = dataloaders(data, 16, "crop+flip", seed=5).train
    teacher_outputs = CachedOutputs(teacher, loader, Cached(tmp_path, dtype), frozenset({"logits", "pooled"}))
    teacher_outputs.open(view=3)
    index = data.splits["train"][[5, 0, 17, 8]]
    stored = teacher_outputs.outputs(index)
    live = teacher.outputs((loader.images(index, view=3),), teacher_outputs.features)
    assert stored.logits.shape == (4, 3) and stored.pooled.shape == (4, 16) and stored.logits.dtype == torch.float32
    assert torch.allclose(stored.logits, live.logits, rtol=error, atol=0)
    assert torch.allclose(stored.pooled, live.pooled, rtol=error, atol=0)


@pytest.mark.parametrize("method", [DKD(), RKD(), KD() + RKD(), CC()], ids=["dkd", "rkd", "kd+rkd", "cc"])
def test_methods_of_targets_features_and_adapters_train_as_with_a_live_teacher(data, tmp_path, method):
    def lazy():  # a run's: drawing it must not move the projectors' random numbers
        teacher = Teacher(lambda: network("mini_resnet_s"), chunk=16)
        teacher.identity = lambda: {"model": "mini_resnet_s", "weights": "seed 1"}
        return teacher

    live, _ = trained(data, lazy(), method)
    computed, first = trained(data, lazy(), method, Cached(tmp_path, "float32"))
    found, second = trained(data, lazy(), method, Cached(tmp_path, "float32"))
    assert equal(live, computed) and equal(live, found)
    assert first.distill.teacher_s > 0 and second.distill.teacher_s == 0
    projectors = [learn.distill.projectors.state_dict() for learn in (first, second)]
    assert equal(*projectors) and bool(projectors[0]) == (method.name == "cc")


def test_methods_temperatures_and_seeds_share_what_is_stored(data, tmp_path):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    trained(data, teacher, KD(), Cached(tmp_path))
    for method in (KD(T=2), DKD()):
        _, learn = trained(data, teacher, method, Cached(tmp_path))
        assert learn.distill.teacher_s == 0
    assert len(list(tmp_path.glob("[!.]*"))) == 1


def test_recycled_views_are_computed_once(data, tmp_path):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    trained(data, teacher, KD(), Cached(tmp_path), epochs=5, views=2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_stored_teacher_is_not_even_made(data, tmp_path):
    made = []

    def make():
        made.append(1)
        return network("mini_resnet_s")

    teacher = Teacher(make, chunk=16)
    teacher.identity = lambda: {"model": "mini_resnet_s", "weights": "seed 1"}
    trained(data, teacher, KD(), Cached(tmp_path))
    other = Teacher(make, chunk=16)
    other.identity = teacher.identity
    before, _ = trained(data, other, KD(), Cached(tmp_path))
    assert len(made) == 1 and other.is_lazy and before


def test_making_the_teacher_does_not_move_the_students_random_numbers(data, tmp_path):
    def lazy():
        teacher = Teacher(lambda: create_model("mini_resnet_s", 3, 32), chunk=16)
        teacher.identity = lambda: {"model": "mini_resnet_s", "weights": "unknown"}
        return teacher

    plain, _ = trained(data, Teacher(network("mini_resnet_s")), KD(alpha=0))
    for stored in (None, Cached(tmp_path)):
        student, _ = trained(data, lazy(), KD(alpha=0), stored)
        assert equal(plain, student)


@pytest.mark.parametrize("change", ["teacher", "data", "augmentation", "view seed", "chunk", "dtype", "fields", "threads"])
def test_whatever_matters_is_part_of_the_key(data, tmp_path, change):
    def key(
        name="mini_resnet_s", seed=1, data=data, augment="crop+flip", view_seed=5, chunk=16, dtype="float16", fields=("logits",)
    ):
        loader = dataloaders(data, 16, augment, view_seed).train
        return CachedOutputs(Teacher(network(name, seed), chunk=chunk), loader, Cached(tmp_path, dtype), frozenset(fields)).key

    labels = data.labels.clone()
    labels[0] = 2
    changed = {
        "teacher": {"seed": 2},
        "data": {"data": replace(data, labels=labels)},
        "augmentation": {"augment": "crop"},
        "view seed": {"view_seed": 6},
        "chunk": {"chunk": 8},
        "dtype": {"dtype": "float32"},
        "fields": {"fields": ("logits", "pooled")},
    }
    assert key() == key()
    if change == "threads":
        before = key()
        torch.set_num_threads(2)
        try:
            assert key() != before
        finally:
            torch.set_num_threads(1)
    else:
        assert key(**changed[change]) != key()


def test_a_damaged_file_is_said_and_computed_again(data, tmp_path):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    sound, _ = trained(data, teacher, KD(), Cached(tmp_path))
    damaged = sorted(tmp_path.rglob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="is not used but computed again: it is cut short"):
        again, _ = trained(data, teacher, KD(), Cached(tmp_path))
    assert equal(sound, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(data, teacher, KD(), Cached(tmp_path))  # mended


@pytest.mark.parametrize("trouble", ["a file in its place", "no room", "read-only"])
def test_a_store_that_cannot_be_written_changes_nothing_but_the_time(data, tmp_path, trouble):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    sound, _ = trained(data, teacher, KD(), Cached(tmp_path / "sound"))
    folder, limit = tmp_path / "store", None
    if trouble == "a file in its place":
        folder.write_text("")
    elif trouble == "no room":
        limit = 1e-9
    else:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("a read-only file system needs root")
    try:
        with pytest.warns(UserWarning, match="cannot be cached in .*: this run computes its own"):
            student, learn = trained(data, teacher, KD(), Cached(folder, limit_gb=limit))
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
    assert equal(sound, student) and learn.distill.cached_outputs.cache is None


def one_of_several(job):
    folder, path = job
    torch.set_num_threads(1)
    data = load_data(path, 32)
    weights, learn = trained(data, Teacher(network("mini_resnet_s"), chunk=16), KD(), Cached(folder), epochs=6)
    return weights, learn.distill.teacher_s > 0


def test_runs_at_the_same_time_divide_the_work_and_agree(tmp_path):
    path = write_images(tmp_path / "fruit", {"apple": 20, "kiwi": 20, "plum": 20})
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        results = list(pool.map(one_of_several, [(tmp_path / "store", str(path))] * 3))
    assert all(equal(results[0][0], weights) for weights, _ in results[1:])
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 6
    assert not list((tmp_path / "store").rglob("*.partial"))


@pytest.mark.parametrize(
    "method, cbs, said",
    [
        (AT(), [], "the method compares stages, which are too large to be cached"),
        (KD(), [MixUp()], "MixUp changes the images after the view is drawn"),
        (KD(), [CutMix()], "CutMix changes the images after the view is drawn"),
    ],
    ids=["maps", "mixup", "cutmix"],
)
def test_what_cannot_be_stored_is_refused_or_taught_live_as_asked(data, tmp_path, method, cbs, said):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    with pytest.raises(KdfastError, match=said):
        trained(data, teacher, method, Cached(tmp_path), cbs)
    live, _ = trained(data, teacher, method, None, cbs)
    fallen, learn = trained(data, teacher, method, Cached(tmp_path, fallback=True), cbs)
    assert equal(live, fallen) and said in learn.distill.obstacle and not list(tmp_path.iterdir())


def test_other_dataloaders_cannot_be_shown_again(tmp_path):
    path = write_images(tmp_path / "fruit", {"apple": 20, "kiwi": 20})
    dls = ImageDataLoaders.from_folder(path, valid_pct=0.25, seed=0, bs=6, num_workers=0, device="cpu")
    distill = Distill(Teacher(network("mini_resnet_s")), KD(), cached=Cached(tmp_path / "s"))
    learn = Learner(dls, create_model("mini_resnet_xs", 2, 12), cbs=distill)
    with learn.no_bar(), pytest.raises(KdfastError, match="do not come from kdfast's dataloaders"):
        learn.fit(1)


def test_logits_beyond_float16_are_refused_with_the_remedy(data, tmp_path):
    loud = network("mini_resnet_s")
    with torch.no_grad():
        loud.head.bias += 1e6
    with pytest.raises(KdfastError, match="which float16 does not hold: cache float32"):
        trained(data, Teacher(loud, chunk=16), KD(), Cached(tmp_path))
    trained(data, Teacher(loud, chunk=16), KD(), Cached(tmp_path, "float32"), epochs=1)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(KdfastError, match="unknown dtype of cached teacher outputs 'float8'"):
        Cached("x", "float8")


def test_a_run_says_where_its_teachers_answers_came_from(image_folder, tmp_path):
    def record(**parameters):
        return finish(Experiment({"dataset": str(image_folder), "image_size": 16, "epochs": 2, **parameters}, tmp_path / "runs"))

    record(student="mini_resnet_s")
    student = {"student": "mini_resnet_xs", "teacher": "mini_resnet_s", "method": "kd"}
    live = record(**student)
    exact = record(**student, teacher_outputs="float32")
    half = record(**student, teacher_outputs="float16")
    assert live.model["weights_sha256"] == exact.model["weights_sha256"] != half.model["weights_sha256"]
    assert live.last == exact.last
    assert [r.teacher_outputs["source"] for r in (live, exact, half)] == ["live", "float32", "float16"]
    assert exact.teacher_outputs["views"] == 2 and exact.teacher_outputs["teacher_s"] > 0
    fallen = record(**student | {"method": "at"}, teacher_outputs="float16", fallback=True)
    assert fallen.teacher_outputs["source"] == "live" and "too large" in fallen.teacher_outputs["why_live"]


def test_a_teachers_changed_weights_are_not_used(image_folder, tmp_path):
    common = {"dataset": str(image_folder), "image_size": 16, "epochs": 1}
    teacher = Experiment({**common, "student": "mini_resnet_s"}, tmp_path / "runs")
    finish(teacher)
    weights = teacher.folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    student = Experiment({**common, "student": "mini_resnet_xs", "teacher": "mini_resnet_s", "method": "kd"}, tmp_path / "runs")
    with pytest.raises(KdfastError, match=r"is not what run mini_resnet_s\.baseline\.s0-.* wrote"):
        finish(student)


def test_the_readmes_callbacks_show_and_store_a_new_view_each_epoch(data, tmp_path):
    teacher = Teacher(network("mini_resnet_s"), chunk=16)
    cbs = [Views(), Distill(teacher, DKD(), cached=Cached(tmp_path))]
    dls = dataloaders(data, 16, "crop+flip")
    learn = Learner(dls, create_model("mini_resnet_xs", 3, data.size), CrossEntropyLossFlat(), cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
    assert sorted(path.stem for path in tmp_path.rglob("*.safetensors")) == ["view-0000", "view-0001", "view-0002"]
