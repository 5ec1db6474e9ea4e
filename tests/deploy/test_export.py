"""What a user of an exported student gets: the same answers, files that are whole, and a card that tells the truth."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import finish
from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, aug_transforms
from PIL import Image

from kdfast.core.errors import KdfastError
from kdfast.deploy import export
from kdfast.deploy.export import export_student
from kdfast.deploy.onnx import runner, write_int8, write_onnx
from kdfast.experiment.runner import Experiment
from kdfast.models.registry import count_parameters, create_model
from kdfast.training.learner import set_seed


@pytest.fixture(scope="module")
def taught(runs):
    """An experiment that is over, three epochs of digits, with projectors beside the student; and its record."""
    how = {"teacher": "mini_resnet_s", "method": "fitnet", "method_args": {"weight": 0.1}, "epochs": 3}
    experiment = Experiment({"student": "mini_resnet_xl", **how}, runs)
    return experiment, finish(experiment)


@pytest.fixture(scope="module")
def exported(taught, tmp_path_factory):
    experiment, record = taught
    return export_student(experiment.learn, tmp_path_factory.mktemp("export") / "student", record=record)


def images(experiment, part="test"):
    """RGB on the scale 0…1, as no loader has touched them."""
    return experiment.data.images[experiment.data.splits[part]].float() / 255


def varied(name, size):
    """A network whose classifier and statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = create_model(name, 10, size)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, 0.05)
            elif hasattr(module, "momentum"):
                module.momentum = 1
        model.train()(torch.randn(32, 3, size, size))
    return model.eval()


ARCHITECTURES = {"mini_mobile_m": 8, "mini_vit_s": 8, "cifar_shufflenet_v2": 32, "resnet18": 32, "mobilenet_v3_small": 32,
                 "regnet_y_800mf": 64, "densenet121": 32, "swin_t": 32}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_onnx_file_answers_as_torch_does_at_any_batch_size(name, tmp_path):
    size = ARCHITECTURES[name]
    model = varied(name, size)
    write_onnx(model, (size, size), tmp_path / "net.onnx")
    run = runner(tmp_path / "net.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            wanted = model(x)
        assert wanted.std() > 1e-3
        torch.testing.assert_close(run(x), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "how"), [("mini_vit_l", "dynamic"), ("mini_plain_xl", "static")])
def test_attention_is_quantised_dynamically_and_convolutions_statically(name, how, tmp_path):
    model, x = varied(name, 8), torch.randn(16, 3, 8, 8)
    write_onnx(model, (8, 8), tmp_path / "net.onnx")
    assert write_int8(tmp_path / "net.onnx", tmp_path / "int8.onnx", x) == how
    with torch.no_grad():
        wanted = model(x)
    error = (runner(tmp_path / "int8.onnx")(x) - wanted).abs().max()
    assert 0 < error < 0.3 * wanted.std()


def test_the_student_takes_plain_images_and_normalises_them_itself(taught, exported):
    experiment, _ = taught
    model, dl = experiment.learn.model.eval(), experiment.learn.dls[2]
    with torch.no_grad():
        wanted = torch.cat([model(x) for x, _ in dl])
    torch.testing.assert_close(runner(exported.onnx)(images(experiment)), wanted, atol=1e-4, rtol=0)
    assert exported.difference <= 1e-4


def test_int8_is_a_fraction_of_the_size_and_as_accurate(exported):
    assert exported.int8.stat().st_size < 0.4 * exported.onnx.stat().st_size
    assert exported.accuracy["onnx"] == exported.accuracy["torch"] > 0.8
    assert abs(exported.accuracy["int8"] - exported.accuracy["torch"]) <= 0.03


def test_accuracies_are_those_of_the_test_images(taught, exported):
    experiment, record = taught
    labels = experiment.data.labels[experiment.data.splits["test"]]
    for kind, path in (("onnx", exported.onnx), ("int8", exported.int8)):
        right = (runner(path)(images(experiment)).argmax(1) == labels).double().mean().item()
        assert exported.accuracy[kind] == pytest.approx(right)
    assert exported.part == "test" and exported.accuracy["torch"] == pytest.approx(record.last["test"]["top1"], abs=0.005)


def test_the_file_holds_the_student_alone(taught, exported):
    experiment, _ = taught
    assert count_parameters(experiment.learn.distill.projectors) > 0
    numbers = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(exported.onnx).graph.initializer)
    assert numbers <= count_parameters(experiment.learn.model) + 6  # the normalisation's
    properties = {p.key: p.value for p in onnx.load(exported.int8).metadata_props}
    assert json.loads(properties["classes"]) == list(experiment.data.classes)
    assert json.loads(properties["image_size"]) == [8, 8]


def test_the_same_weights_give_the_same_files_whatever_the_test_images(taught, exported, tmp_path):
    experiment, record = taught
    learn, others = experiment.learn, experiment.learn.dls[1]
    loaders, learn.dls.loaders = learn.dls.loaders, [*learn.dls.loaders[:2], others]
    try:
        again = export_student(learn, tmp_path / "again", record=record)
    finally:
        learn.dls.loaders = loaders
    for kind in ("onnx", "int8"):
        assert getattr(again, kind).read_bytes() == getattr(exported, kind).read_bytes()


def test_a_learner_is_as_it_was(taught, tmp_path):
    learn = taught[0].learn
    learn.model.train()
    state, rng = {k: v.clone() for k, v in learn.model.state_dict().items()}, torch.get_rng_state()
    found = export_student(learn, tmp_path / "student", quantize=False)
    assert learn.model.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    assert found.int8 is None and sorted(p.name for p in found.folder.iterdir()) == ["README.md", "student.onnx"]
    assert "int8" not in found.card.read_text()


# The card


def test_the_card_says_what_the_student_is_and_where_it_comes_from(taught, exported):
    experiment, record = taught
    card = exported.card.read_text()
    weights = experiment.folder / "weights.safetensors"
    facts = [
        "mini_resnet_xl", "10 classes", "float32 (batch, 3, 8, 8)", f"{count_parameters(experiment.learn.model):,}", record.id,
        experiment.teacher.record.id, repr(experiment.learn.distill.method), hashlib.sha256(weights.read_bytes()).hexdigest(),
        f"{exported.onnx.stat().st_size:,}", f"{exported.int8.stat().st_size:,}", f"{weights.stat().st_size:,}",
        "test images", json.dumps(list(experiment.data.classes)), *(f"{value:.4f}" for value in exported.accuracy.values()),
        *(f"{value:.4g}" for value in (*experiment.data.stats[0], *experiment.data.stats[1])), "256 training images",
    ]  # fmt: skip
    assert [fact for fact in facts if fact not in card] == []
    assert not re.search(r"20\d\d-\d\d", card)


def test_the_cards_example_classifies_an_image(taught, exported):
    experiment, _ = taught
    pixels = experiment.data.images[experiment.data.splits["test"][3]]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(exported.folder / "image.png")
    code = re.search(r"```python\n(.*?)```", exported.card.read_text(), re.DOTALL)[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=exported.folder, capture_output=True, text=True, check=True)
    (exported.folder / "image.png").unlink()
    best = runner(exported.onnx)(pixels[None].float() / 255).argmax().item()
    assert run.stdout.strip() == experiment.data.classes[best]


# fastai's own Learners


@pytest.fixture
def fruit(image_folder):
    """A Learner as fastai's documentation makes it: augmented, normalised, without a test part."""
    tfms = [*aug_transforms(size=16), Normalize.from_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])]
    options = {"valid_pct": 0.3, "seed": 0, "bs": 8, "num_workers": 0, "batch_tfms": tfms}
    dls = ImageDataLoaders.from_folder(image_folder, item_tfms=Resize(20), **options)
    torch.manual_seed(0)
    return Learner(dls, create_model("mini_resnet_m", 3, 16))


def test_a_fastai_learner_is_exported_with_its_normalisation_and_classes(fruit, tmp_path):
    first = export_student(fruit, tmp_path / "a", name="mine")
    set_seed(7)
    second = export_student(fruit, tmp_path / "b", name="mine")
    assert first.int8.read_bytes() == second.int8.read_bytes()  # training images are not augmented for calibration
    assert first.card.read_text() == second.card.read_text() and first.part == "valid"
    assert '["apple", "kiwi", "plum"]' in first.card.read_text() and "# mine, 3 classes" in first.card.read_text()
    x, _ = fruit.dls.valid.one_batch()
    plain = (
        x.as_subclass(torch.Tensor) * torch.tensor([0.2, 0.3, 0.4])[:, None, None] + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    )
    with torch.no_grad():
        wanted = fruit.model.eval()(x.as_subclass(torch.Tensor))
    torch.testing.assert_close(runner(first.onnx)(plain), wanted, atol=1e-4, rtol=0)


def test_images_of_ones_own_calibrate_int8(fruit, tmp_path):
    dark, whole = (export_student(fruit, tmp_path / f"{v}", calibration=torch.rand(4, 3, 16, 16) * v) for v in (0.1, 1.0))
    assert dark.int8.read_bytes() != whole.int8.read_bytes() and "4 other images" in dark.card.read_text()
    for wrong in (torch.rand(4, 3, 8, 8), torch.rand(4, 3, 16, 16) * 255):
        with pytest.raises(KdfastError, match=r"calibration must be images \(N, 3, 16, 16\)"):
            export_student(fruit, tmp_path / "wrong", calibration=wrong)


def test_a_learner_whose_normalisation_is_unknown_is_refused(fruit, tmp_path):
    fruit.dls.train.after_batch.fs = fruit.dls.train.after_batch.fs[:0]
    with pytest.raises(KdfastError, match="normalise"):
        export_student(fruit, tmp_path / "student")
    assert not (tmp_path / "student").exists()


# Whole or not at all


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_a_file_that_answers_otherwise_is_refused_and_nothing_is_left_behind(wrong, taught, tmp_path, monkeypatch):
    learn = taught[0].learn
    monkeypatch.setattr(export, "runner", lambda path, threads=0: lambda x: runner(path, threads)(x) + wrong)
    with pytest.raises(KdfastError, match="logits differ"):
        export_student(learn, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_earlier_export_and_a_success_replaces_it(fruit, tmp_path, monkeypatch):
    first = export_student(fruit, tmp_path / "student")
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    monkeypatch.setattr(export, "write_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_student(fruit, tmp_path / "student", quantize=False)
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before
    monkeypatch.undo()
    export_student(fruit, tmp_path / "student", quantize=False)
    assert sorted(p.name for p in first.folder.iterdir()) == ["README.md", "student.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {"fruit", "student"}


def test_a_folder_of_other_things_is_left_alone(fruit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(KdfastError, match="other things"):
        export_student(fruit, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


def test_another_runs_record_is_refused(taught, fruit, tmp_path):
    with pytest.raises(KdfastError, match="not those of run"):
        export_student(fruit, tmp_path / "student", record=taught[1])


def test_a_network_that_onnx_cannot_express_is_refused(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x.flatten(2))[:, :2].sum(-1, keepdim=True)

    with pytest.raises(KdfastError, match="cannot be written as ONNX"):
        write_onnx(Odd(), (8, 8), tmp_path / "odd.onnx")
