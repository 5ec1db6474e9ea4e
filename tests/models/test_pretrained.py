"""Weights to begin with: what is loaded, what stays fresh, what is refused without being run, and the classifier on top."""

import hashlib
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from conftest import finish
from safetensors.torch import save_file
from torch import nn

from kdfast.all import Experiment, KdfastError, Run, Teacher, create_learner, create_model, fit, load_data, load_teacher
from kdfast.models import registry


def drawn(name="mini_resnet_s", classes=10, size=8, seed=1, **options):
    torch.manual_seed(seed)
    return create_model(name, classes, size, **options)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def spread(model, seed=9):
    """Its state with every number drawn anew, so that nothing is loaded that is there anyway."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {k: torch.rand(v.shape, generator=generator) for k, v in model.state_dict().items() if v.is_floating_point()}
    return {k: numbers[k] if k in numbers else v + 3 for k, v in model.state_dict().items()}


def sentence(error):
    text = str(error.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def write(weights, path):
    """A state dict as a file, in one of the forms that are taken."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if path.stem == "nested" else weights, path)
    return str(path)


FORMS = ["flat.safetensors", "flat.pth", "nested.pth"]


# Files


@pytest.mark.parametrize("file", FORMS)
def test_a_file_of_weights_is_loaded_classifier_included(tmp_path, file):
    weights = spread(drawn())
    loaded = state(drawn(seed=2, weights=write(weights, tmp_path / file)))
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize("file", FORMS)
def test_the_classifier_stays_as_drawn_where_the_classes_are_others(tmp_path, file):
    weights = spread(drawn(classes=10))
    path = write(weights, tmp_path / file)
    loaded, fresh = state(drawn(classes=7, seed=2, weights=path)), state(drawn(classes=7, seed=2))
    assert loaded["head.weight"].shape == (7, 16)
    for k in loaded:
        assert torch.equal(loaded[k], (fresh if k.startswith("head.") else weights)[k]), k


def test_a_classifier_of_a_hidden_layer_is_loaded_if_it_fits_and_fresh_if_it_does_not(tmp_path):
    mlp, linear = spread(drawn(head="mlp")), spread(drawn())
    mlp_path, linear_path = write(mlp, tmp_path / "mlp.safetensors"), write(linear, tmp_path / "linear.safetensors")
    same = state(drawn(seed=2, weights=mlp_path, head="mlp"))
    assert same.keys() == mlp.keys() and all(torch.equal(same[k], mlp[k]) for k in mlp)
    for path, source, options in ((linear_path, linear, {"head": "mlp"}), (mlp_path, mlp, {"head": "linear"}),
                                  (mlp_path, mlp, {"head": "mlp", "classes": 7})):  # fmt: skip
        loaded, shapes = state(drawn(seed=2, weights=path, **options)), state(drawn(seed=2, **options))
        assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in shapes.items()}
        assert all(torch.equal(v, source[k]) for k, v in loaded.items() if not k.startswith("head."))
        assert loaded["head.3.weight" if options["head"] == "mlp" else "head.weight"].std() < 0.3  # and not in 0…1, as the file's


def test_torchvisions_networks_take_files_too(tmp_path):
    weights = spread(drawn("mobilenet_v3_small", 10, 32))
    loaded = state(drawn("mobilenet_v3_small", 5, 32, seed=2, weights=write(weights, tmp_path / "nested.pth")))
    assert loaded["classifier.3.weight"].shape == (5, 1024)
    assert all(torch.equal(v, weights[k]) for k, v in loaded.items() if not k.startswith("classifier.3."))


# Files that are refused


class Evil:
    """Pickled, it makes whoever reads it create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(path, name="mini_resnet_s", size=8):
    with pytest.raises(KdfastError) as error:
        create_model(name, 10, size, weights=str(path))
    return sentence(error)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pickled_object_is_never_run(tmp_path, suffix):
    trap, weights = tmp_path / "trap", state(drawn())
    evil = Evil(trap)
    writers = [
        torch.save,
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
    ]
    for i, content in enumerate([evil, {"state_dict": weights, "optimizer": evil}, weights | {"stem.0.weight": evil}]):
        for j, writer in enumerate(writers):
            path = tmp_path / f"evil{i}{j}{suffix}"
            writer(content, path)
            assert path.name in refused(path) and not trap.exists()
    pickle.loads(pickle.dumps(evil)).close()
    assert trap.exists()  # it would have worked


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", [0, 1, 6, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, suffix, part):
    path = tmp_path / f"flat{suffix}"
    write(state(drawn()), path)
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    assert path.name in refused(path)


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "none", "no folder/none.pth"])
def test_a_missing_file_is_refused(tmp_path, name):
    assert "none" in refused(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    assert "folder" in refused(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.ones(3), {}, {"state_dict": {}}, {"state_dict": 3}, {"epoch": 3}, {"stem.0.weight": 1.0}, {1: torch.ones(2)}],
    ids=["list", "tensor", "empty", "empty inside", "number", "no weights", "a number for a weight", "unnamed"],
)
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert "other.pth" in refused(tmp_path / "other.pth")


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    weights = state(drawn())
    write(weights, tmp_path / "a.pth")
    write(weights, tmp_path / "b.safetensors")
    (tmp_path / "a.pth").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").rename(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_text("<html>not found</html>")
    (tmp_path / "d.safetensors").write_text("<html>not found</html>")
    (tmp_path / "e.txt").write_text("weights")
    for name in ("a.safetensors", "b.pth", "c.pth", "d.safetensors", "e.txt"):
        assert name in refused(tmp_path / name)


@pytest.mark.parametrize("file", FORMS)
@pytest.mark.parametrize("other", ["mini_plain_s", "mini_resnet_m", "mini_mobile_s", "mini_vit_s"])
def test_weights_of_another_network_are_refused(tmp_path, file, other):
    assert file in refused(write(state(drawn(other)), tmp_path / file))


def test_a_deeper_network_that_begins_in_the_same_way_is_another_network(tmp_path):
    deep, shallow = state(drawn("cifar_resnet14", size=32)), state(drawn("cifar_resnet8", size=32))
    assert all(deep[k].shape == v.shape for k, v in shallow.items()) and len(deep) > len(shallow)
    assert "deep.safetensors" in refused(write(deep, tmp_path / "deep.safetensors"), "cifar_resnet8", 32)


def test_weights_with_a_missing_or_a_misshapen_layer_are_refused(tmp_path):
    whole = state(drawn())
    lacking = {k: v for k, v in whole.items() if k != "stem.1.running_mean"}
    for i, weights in enumerate((lacking, whole | {"stem.0.weight": torch.ones(8, 3, 5, 5)})):
        assert f"{i}.safetensors" in refused(write(weights, tmp_path / f"{i}.safetensors"))


class FcNorm(nn.Module):
    """A network with a layer whose name begins as its classifier's does."""

    def __init__(self, classes, size):
        super().__init__()
        self.fc_norm, self.fc = nn.BatchNorm1d(3 * size**2), nn.Linear(3 * size**2, classes)

    def forward(self, x):
        return self.fc(self.fc_norm(x.flatten(1)))


def test_only_the_classifier_may_be_missing_not_what_is_named_like_it(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, "fc_norm", registry.Architecture("fc_norm", "own", FcNorm))
    weights = {k: v for k, v in state(FcNorm(10, 8)).items() if k.startswith("fc.")}
    assert "part.pth" in refused(write(weights, tmp_path / "part.pth"), "fc_norm")


@pytest.mark.parametrize("file", ["flat.safetensors", "flat.pth"])
def test_files_of_before_batchnorm_counted_are_taken_as_torch_takes_them(tmp_path, file):
    weights = spread(drawn())
    old = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(weights)
    if file.endswith(".pth"):
        drawn().load_state_dict(old)  # which torch does not mind
    loaded = state(drawn(seed=2, weights=write(old, tmp_path / file)))
    assert all(torch.equal(loaded[k], v) for k, v in old.items())
    assert all(v == 0 for k, v in loaded.items() if k.endswith("num_batches_tracked"))


def test_weights_for_another_image_size_are_refused_where_it_matters(tmp_path):
    path = write(state(drawn("mini_vit_s", size=16)), tmp_path / "vit.safetensors")
    refused(path, "mini_vit_s", 8)


# Heads


@pytest.mark.parametrize(
    ("name", "size", "where", "width"),
    [
        ("resnet18", 32, "fc", 512),
        ("regnet_y_400mf", 32, "fc", 440),
        ("swin_t", 32, "head", 768),
        ("densenet121", 32, "classifier", 1024),
        ("mobilenet_v3_small", 32, "classifier.3", 1024),
        ("vit_b_32", 32, "heads.head", 768),
        ("mini_resnet_s", 8, "head", 16),
        ("mini_vit_s", 8, "head", 32),
        ("cifar_resnet8", 32, "head", 64),
    ],
)
def test_an_mlp_head_replaces_the_last_linear_layer_alone(name, size, where, width):
    with torch.device("meta" if name in ("swin_t", "vit_b_32") else "cpu"):  # for time
        plain = create_model(name, 7, size)
    model = create_model(name, 7, size, head="mlp").eval()
    layers = dict(plain.named_modules())
    last = [path for path, module in layers.items() if isinstance(module, nn.Linear)][-1]
    assert last == where and layers[last].in_features == width
    head = model.get_submodule(last)
    first, relu, dropout, second = head
    assert (type(first), first.in_features, first.out_features) == (nn.Linear, width, width // 2)
    assert type(relu) is nn.ReLU and (type(dropout), dropout.p) == (nn.Dropout, 0.4)
    assert (type(second), second.in_features, second.out_features) == (nn.Linear, width // 2, 7)
    assert first.bias is not None and second.bias is not None
    rest, others = ({k: v.shape for k, v in net.state_dict().items() if not k.startswith(f"{last}.")} for net in (plain, model))
    assert rest == others
    given = []
    head.register_forward_pre_hook(lambda module, inputs: given.append(*inputs))
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7) and given[0].shape == (2, width)
    expected = (given[0] @ first.weight.T + first.bias).clamp_min(0) @ second.weight.T + second.bias
    assert torch.allclose(logits, expected, atol=1e-5)


def test_an_mlp_head_drops_out_in_training_and_learns_with_the_rest():
    run = Run(student="mini_resnet_s", epochs=1, head="mlp")
    learn = create_learner(run, load_data("digits"))
    before = state(learn.model)
    x, _ = learn.dls.valid.one_batch()
    learn.model.train()
    assert not torch.equal(learn.model(x), learn.model(x))
    learn.model.eval()
    assert torch.equal(learn.model(x), learn.model(x))
    fit(learn, run, progress=False)
    assert all(not torch.equal(before[k], state(learn.model)[k]) for k in ("head.0.weight", "head.3.weight", "stem.0.weight"))


# ImageNet


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torchvision's folder of downloads, empty, without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def download(url, *args, **kwargs):
        raise OSError(f"no network for {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def cached(cache, name, weights, version="IMAGENET1K_V1"):
    """Put these weights where torchvision has its own, under its own name."""
    file = Path(getattr(tv.get_model_weights(name), version).url).name
    torch.save(weights, cache / file)
    return cache / file


@pytest.fixture(scope="module")
def imagenet():
    """What stands for ImageNet weights."""
    return spread(tv.mobilenet_v3_small())


@pytest.mark.parametrize("weights", ["imagenet", "imagenet:IMAGENET1K_V1"])
def test_imagenet_weights_come_from_torchvisions_cache(cache, imagenet, weights):
    cached(cache, "mobilenet_v3_small", imagenet)
    loaded, fresh = (state(drawn("mobilenet_v3_small", 5, 32, seed=2, **more)) for more in ({"weights": weights}, {}))
    for k, v in loaded.items():
        assert torch.equal(v, (fresh if k.startswith("classifier.3.") else imagenet)[k]), k


def test_imagenet_weights_with_their_own_thousand_classes_are_loaded_whole(cache, imagenet):
    cached(cache, "mobilenet_v3_small", imagenet)
    loaded = state(drawn("mobilenet_v3_small", 1000, 32, weights="imagenet"))
    assert all(torch.equal(v, imagenet[k]) for k, v in loaded.items())


def test_imagenet_weights_go_under_an_mlp_head(cache, imagenet):
    cached(cache, "mobilenet_v3_small", imagenet)
    loaded = state(drawn("mobilenet_v3_small", 5, 32, weights="imagenet", head="mlp"))
    assert loaded["classifier.3.3.weight"].shape == (5, 512)
    assert all(torch.equal(v, imagenet[k]) for k, v in loaded.items() if not k.startswith("classifier.3."))


def test_resnets_file_is_found_by_its_name_and_a_version_can_be_chosen(cache):
    first, second = spread(tv.mobilenet_v3_large(), 1), spread(tv.mobilenet_v3_large(), 2)
    cached(cache, "mobilenet_v3_large", first)
    cached(cache, "mobilenet_v3_large", second, "IMAGENET1K_V2")
    for weights, expected in (("imagenet:IMAGENET1K_V1", first), ("imagenet:IMAGENET1K_V2", second)):
        loaded = drawn("mobilenet_v3_large", 5, 32, weights=weights)
        assert torch.equal(loaded.features[0][0].weight, expected["features.0.0.weight"])
    weights = spread(tv.resnet18())
    torch.save(weights, cache / "resnet18-f37072fd.pth")
    assert torch.equal(drawn("resnet18", 5, 32, weights="imagenet").layer4[1].bn2.bias, weights["layer4.1.bn2.bias"])


def test_densenets_file_of_2017_is_loaded_as_torchvision_loads_it(cache):
    """`norm.1` for `norm1`, without what BatchNorm counts since 2018."""
    weights = {k: v for k, v in spread(tv.densenet121()).items() if not k.endswith("num_batches_tracked")}
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v for k, v in weights.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    cached(cache, "densenet121", old)
    assert torch.equal(tv.densenet121(weights="IMAGENET1K_V1").classifier.bias, weights["classifier.bias"])  # as the file is
    loaded = state(drawn("densenet121", 5, 32, weights="imagenet"))
    assert all(torch.equal(loaded[k], v) for k, v in weights.items() if not k.startswith("classifier."))


def test_mnasnets_file_with_its_version_is_loaded(cache):
    model = tv.mnasnet0_5()
    cached(cache, "mnasnet0_5", model.state_dict())  # its metadata tell its version, without which it refuses
    assert torch.equal(drawn("mnasnet0_5", 5, 32, weights="imagenet").layers[0].weight, model.layers[0].weight)


def test_googlenets_file_has_auxiliary_classifiers_that_are_not_wanted(cache):
    weights = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in tv.googlenet(init_weights=False).state_dict().items()}
    assert any(k.startswith("aux1.") for k in weights)
    cached(cache, "googlenet", weights)
    assert not drawn("googlenet", 5, 64, weights="imagenet").inception5b.branch1.conv.weight.any()


def test_an_unknown_version_is_refused_with_those_there_are(cache):
    for name, there in (("mobilenet_v3_small", {"IMAGENET1K_V1"}), ("resnet50", {"IMAGENET1K_V1", "IMAGENET1K_V2"})):
        with pytest.raises(KdfastError, match="NOPE") as error:
            create_model(name, 10, 32, weights="imagenet:NOPE")
        text = sentence(error)
        assert all(version in text for version in there) and ("IMAGENET1K_V2" in there or "IMAGENET1K_V2" not in text)


@pytest.mark.parametrize("weights", ["imagenet", "imagenet:IMAGENET1K_V1"])
@pytest.mark.parametrize("name", ["mini_resnet_s", "mini_vit_s", "cifar_resnet8"])
def test_networks_for_small_images_have_no_imagenet_weights_and_say_so(cache, name, weights):
    with pytest.raises(KdfastError, match=name) as error:
        create_model(name, 10, 32, weights=weights)
    assert "imagenet" in sentence(error).lower()


def test_weights_that_cannot_be_downloaded_are_refused_in_a_sentence(cache):
    with pytest.raises(KdfastError, match="mobilenet_v3_small") as error:
        create_model("mobilenet_v3_small", 10, 32, weights="imagenet")
    sentence(error)


@pytest.mark.parametrize("part", [0, 5000, 0.999])
def test_a_broken_download_is_refused_in_a_sentence(cache, imagenet, part):
    path = cached(cache, "mobilenet_v3_small", imagenet)
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    with pytest.raises(KdfastError, match="mobilenet_v3_small") as error:
        create_model("mobilenet_v3_small", 10, 32, weights="imagenet")
    sentence(error)


def test_a_pickled_object_among_the_downloads_is_refused_and_not_run(cache, tmp_path):
    cached(cache, "mobilenet_v3_small", Evil(tmp_path / "trap"))
    with pytest.raises(KdfastError, match="mobilenet_v3_small") as error:
        create_model("mobilenet_v3_small", 10, 32, weights="imagenet")
    assert sentence(error) and not (tmp_path / "trap").exists()


# Runs


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("begun", [True, False], ids=["weights", "fresh"])
def test_a_run_with_weights_or_a_head_teaches_and_its_record_says_where_it_began(tmp_path, begun, head):
    path = write(state(drawn(classes=7, seed=4)), tmp_path / "begin.safetensors")
    given = {"head": head} | ({"weights": path} if begun else {})
    experiment = Experiment({"student": "mini_resnet_s", "epochs": 1, **given}, tmp_path / "runs")
    data = experiment.load()
    began = state(experiment.learner().model)
    experiment.fit(progress=False)
    record = experiment.finish()
    if begun:
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert record.model["initial"] == {"weights": path, "sha256": sha256}
        assert torch.equal(began["stem.0.weight"], drawn(classes=7, seed=4).stem[0].weight)
    else:
        assert "initial" not in record.model
    Path(path).unlink()  # it has served
    teacher = load_teacher(experiment.folder, data)
    x, _ = experiment.learn.dls.valid.one_batch()
    assert torch.equal(teacher(x), experiment.learn.model.eval()(x))
    run = Run(student="mini_resnet_xs", teacher=experiment.run.id, method="at", epochs=1)
    learn = create_learner(run, data, teacher)
    fit(learn, run, progress=False)
    assert all(v == v for v in learn.recorder.values[-1])


def test_a_runs_weights_begin_another(tmp_path):
    first = Experiment({"student": "mini_resnet_xs", "epochs": 1, "head": "mlp"}, tmp_path)
    finish(first)
    path = first.folder / "weights.safetensors"
    second = Experiment({"student": "mini_resnet_xs", "epochs": 1, "head": "mlp", "weights": str(path)}, tmp_path)
    second.load()
    began, ended = state(second.learner().model), state(first.learn.model)
    assert all(torch.equal(began[k], ended[k]) for k in ended)
    assert first.run.id != second.run.id


def test_imagenet_weights_are_named_in_the_record(tmp_path, cache, image_folder, imagenet):
    cached(cache, "mobilenet_v3_small", imagenet)
    given = {"dataset": str(image_folder), "image_size": 32, "student": "mobilenet_v3_small", "batch_size": 32, "augment": "none"}
    record = finish(Experiment(given | {"epochs": 1, "weights": "imagenet", "lr": 1e-3}, tmp_path / "runs"))
    assert record.model["initial"]["weights"] == "imagenet"
    shutil.rmtree(cache)
    (folder,) = (tmp_path / "runs").glob(f"fruit-*/{record.id}")
    data = Experiment(given, tmp_path / "runs").load()
    assert load_teacher(folder, data).model is not None  # without the cache


@pytest.mark.parametrize("method", ["kd", "fitnet", "sp"])
def test_students_with_an_mlp_head_can_be_distilled(method):
    run = Run(student="mini_resnet_xs", teacher="mini_resnet_s", method=method, epochs=1, head="mlp")
    learn = create_learner(run, load_data("digits"), Teacher(drawn()))
    fit(learn, run, progress=False)
    assert all(v == v for v in learn.recorder.values[-1])
