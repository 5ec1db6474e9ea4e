"""The networks of papers on CIFAR-100: their sizes, what is found in them, and that every method takes them."""

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import TensorDataset

from kdfast.all import Distill, create_method, create_model
from kdfast.core.errors import KdfastError
from kdfast.distill.hooks import watching
from kdfast.distill.method import method_class, method_names
from kdfast.distill.stages import probe
from kdfast.models.cifar import NETWORKS
from kdfast.models.registry import architecture, count_parameters

torch.set_num_threads(1)

PARAMETERS = {
    "resnet8": 83_892, "resnet14": 181_108, "resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188, "resnet56": 861_620,
    "resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860, "wrn_16_1": 180_916, "wrn_16_2": 703_284,
    "wrn_40_1": 569_780, "wrn_40_2": 2_255_156, "vgg8": 3_965_028, "vgg11": 9_277_284, "vgg13": 9_462_180,
    "mobilenet_v2": 812_836, "shufflenet_v1": 949_258, "shufflenet_v2": 1_355_528, "resnet50": 23_705_252,
}  # fmt: skip
FOUND = {  # (channels, side) of the stages
    "resnet8": [(16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_16_1": [(16, 32), (32, 16), (64, 8)],
    "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
    "vgg8": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "mobilenet_v2": [(12, 16), (16, 8), (48, 4), (1280, 2)],
    "shufflenet_v1": [(24, 32), (240, 16), (480, 8), (960, 4)],
    "shufflenet_v2": [(24, 32), (116, 16), (232, 8), (1024, 4)],
}
OURS = [name for name in method_names() if method_class(name).__module__.startswith("kdfast.distill.methods")]
FEATURES = [name for name in OURS if method_class(name).features]


def net(name, side=32, n_classes=100):
    torch.manual_seed(0)
    return create_model(f"cifar_{name}", n_classes, side)


def test_every_network_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        assert {name: count_parameters(net(name)) for name in NETWORKS} == PARAMETERS


@pytest.mark.parametrize("name", FOUND)
def test_a_backward_through_logits_of_every_class_reaches_every_weight(name):
    model = net(name, n_classes=7)
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 7) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for path, p in model.named_parameters():  # a bias before a BatchNorm has a gradient of 0
        assert p.grad is not None and p.grad.isfinite().all() and (p.ndim == 1 or p.grad.abs().sum() > 0), path


@pytest.mark.parametrize("name", FOUND)
def test_stages_of_falling_resolution_are_found_with_relus_that_can_be_tapped(name):
    model = net(name)
    layout = probe(model, [x := torch.randn(2, 3, 32, 32)])
    with watching(model, [(path, "out") for path in layout.stages]) as seen:
        model(x)
    assert [(f.shape[1], f.shape[2]) for f in seen.values()] == FOUND[name]
    assert layout.cam == ("stages", "head") and layout.pooled and not layout.clipped
    linear = {"stages.1", "stages.2", "stages.4"} if name == "mobilenet_v2" else set()  # blocks that end without a ReLU
    assert layout.relus.keys() == set(layout.stages) - linear
    halves = {"stages.0", "stages.1"} if name == "shufflenet_v2" else set()  # there BatchNorm sees a half of the channels
    assert layout.norms.keys() == set(layout.stages) - halves


def test_families_tell_same_architecture_pairs_from_cross_architecture_ones():
    families = {name: architecture(f"cifar_{name}").family for name in NETWORKS}
    assert {families[name] for name in ("resnet8", "resnet110", "resnet32x4", "resnet50")} == {architecture("resnet18").family}
    for name, torchvisions in (("vgg8", "vgg11"), ("mobilenet_v2", "mobilenet_v2"), ("shufflenet_v2", "shufflenet_v2_x1_0")):
        assert families[name] == architecture(torchvisions).family
    assert (
        len({families[name] for name in ("resnet8", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2")}) == 6
    )


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "mobilenet_v2"])
def test_images_smaller_than_cifars_are_refused_and_larger_ones_are_taken(name):
    with pytest.raises(KdfastError, match=f"cifar_{name} needs images of at least 32 pixels a side, not 28"):
        net(name, 28)
    assert net(name, 64).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 100)


def test_a_wide_resnets_stage_ends_in_the_activation_that_the_next_block_begins_with():
    stages = net("wrn_16_2").stages
    seen = {}
    for path in ("activate", "shortcut", "body"):
        part = stages[1][0].get_submodule(path)
        part.register_forward_pre_hook(lambda module, inputs, path=path: seen.update({path: inputs[0]}))
    active = stages[0](torch.randn(2, 16, 32, 32))
    stages[1](active)
    assert all(torch.equal(seen[path], active) for path in seen) and len(seen) == 3 and active.min() == 0
    assert [type(module) for module in stages[0][-2:]] == [nn.BatchNorm2d, nn.ReLU]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in stages[1][0].activate.modules())


@pytest.mark.parametrize("method", FEATURES)
@pytest.mark.parametrize("pair", [("resnet32x4", "shufflenet_v1"), ("wrn_16_2", "shufflenet_v2"), ("vgg8", "mobilenet_v2")])
def test_every_method_of_features_trains_cross_architecture_pairs(method, pair):
    data = TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([3, 5]))
    dls = DataLoaders(*[DataLoader(data, bs=2, device=torch.device("cpu")) for _ in range(2)], device="cpu")
    teacher, student = map(net, pair)
    before = student.stem[0].weight.detach().clone()
    learn = Learner(dls, student, CrossEntropyLossFlat(), cbs=[Distill(teacher, create_method(method, {}))], lr=1e-4)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1)
    column = list(learn.recorder.metric_names).index(f"train_{method}") - 1
    assert torch.tensor(learn.recorder.values[0][column]).isfinite()
    assert all(p.isfinite().all() for p in student.parameters()) and not torch.equal(student.stem[0].weight, before)
