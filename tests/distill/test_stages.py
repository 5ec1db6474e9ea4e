"""Layers are found, not configured: for every architecture, without disturbing anything."""

import random

import numpy as np
import pytest
import torch
from fastai.vision.learner import create_vision_model
from torch import nn
from torchvision.models import resnet18

from kdfast.distill.features import Features
from kdfast.distill.hooks import evaluating, unwatch, watch_once, watching
from kdfast.distill.stages import pair, probe
from kdfast.models.registry import create_model

torch.set_num_threads(1)
FEATURES = frozenset({"stages", "last", "pooled", "pre_relu"})

# name, image size, (channels, side) of the stages, width of the pooled vector, whether there are class activation maps
FOUND = [
    ("mini_resnet_s", 8, [(8, 8), (16, 4)], 16, True),
    ("mini_resnet_l", 16, [(24, 16), (48, 8)], 48, True),
    ("mini_plain_m", 8, [(16, 8), (32, 4)], 32, True),
    ("mini_mobile_l", 8, [(24, 8), (48, 4)], 48, True),
    ("mini_vit_s", 8, [(32, 4)] * 2, 32, True),
    ("mini_vit_l", 8, [(64, 4)] * 4, 64, True),
    ("resnet18", 64, [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)], 512, True),
    ("mobilenet_v3_small", 64, [(16, 32), (16, 16), (24, 8), (48, 4), (576, 2)], 576, False),
    ("densenet121", 64, [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)], 1024, True),
    ("regnet_y_400mf", 64, [(32, 32), (48, 16), (104, 8), (208, 4), (440, 2)], 440, True),
    ("swin_t", 64, [(96, 16), (192, 8), (384, 4), (768, 2)], 768, True),
    ("vit_b_16", 32, [(768, 2)] * 12, 768, False),
]


def taps_of(model, x, n=None, wanted=FEATURES):
    layout = probe(model, [x])
    wanted = wanted - ({"pre_relu"} if layout.clipped else set()) | ({"cam"} if layout.cam else set())
    return Features(model, layout, wanted, layout.chosen(n or len(layout.stages)))


def outputs(model, features, x):
    with watching(model, features.points) as seen:
        logits = model(x)
    return features.outputs(logits, seen)


@pytest.mark.parametrize("name, size, stages, pooled, cam", FOUND, ids=[row[0] for row in FOUND])
def test_stages_pooled_features_and_class_activation_maps_are_found(name, size, stages, pooled, cam):
    model = create_model(name, 5, size).eval()
    for p in model.parameters():  # heads that start at zero would hide a wrong classifier
        if p.ndim == 2 and p.shape[0] == 5:
            nn.init.normal_(p, 0, 0.02)
    x = torch.randn(2, 3, size, size)
    features = taps_of(model, x)
    out = outputs(model, features, x)
    assert [(f.shape[1], f.shape[2]) for f in out.stages] == stages
    assert all(f.shape[2] == f.shape[3] for f in out.stages)
    assert out.pooled.shape == (2, pooled)
    assert (features.layout.cam is not None) == cam
    if cam:
        assert torch.allclose(out.cam.mean((2, 3)), out.logits, atol=1e-4)


def test_a_fastai_vision_learners_model_with_its_head():
    model = create_vision_model(resnet18, 5, pretrained=False).eval()
    out = outputs(model, features := taps_of(model, x := torch.randn(2, 3, 64, 64)), x)
    assert [f.shape[1] for f in out.stages] == [64, 64, 128, 256, 512]
    assert out.pooled.shape == (2, 1024) and features.layout.cam is None
    assert torch.allclose(out.pooled, torch.cat([out.last.amax((2, 3)), out.last.mean((2, 3))], 1))


def test_maps_before_the_relu_are_what_it_is_given_and_margins_come_from_its_batchnorm():
    model = create_model("resnet18", 5, 64).eval()
    features = taps_of(model, x := torch.randn(2, 3, 64, 64))
    out = outputs(model, features, x)
    assert len(out.pre_relu) == 5
    for before, after in zip(out.pre_relu, out.stages, strict=True):
        assert torch.equal(before.relu(), after) and before.min() < 0
    assert features.norm("layer2") is model.layer2[1].bn2


def test_image_sizes_that_are_not_square():
    model = create_model("resnet18", 5, 64).eval()
    out = outputs(model, taps_of(model, x := torch.randn(2, 3, 64, 96)), x)
    assert out.stages[-1].shape == (2, 512, 2, 3)


@pytest.mark.parametrize("name", ["mini_resnet_s", "mini_vit_s", "densenet121"])
def test_probing_disturbs_nothing(name):
    model = create_model(name, 5, 32).train()
    model.register_forward_hook(lambda *a: None)
    next(model.children()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    probe(model, [torch.zeros(2, 3, 32, 32)])
    assert generators == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_stages_are_paired_from_the_deepest_and_a_transformers_are_spread():
    def layout(name, size):
        return probe(create_model(name, 5, size).eval(), [torch.randn(2, 3, size, size)])

    big, small, vit = layout("resnet18", 64), layout("mini_resnet_xs", 8), layout("mini_vit_l", 8)
    assert pair(small, big) == (("stages.0", "stages"), ("layer3", "layer4"))
    assert pair(small, vit)[1] == ("blocks.1", "blocks.3")
    assert pair(vit, big)[0] == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


def test_watch_once_sees_one_forward_and_keeps_a_forward_of_the_users_own():
    model = create_model("mini_resnet_xs", 5, 8)
    calls, own = [], model.forward
    model.forward = lambda x: (calls.append(1), own(x))[1]
    mine = model.forward
    seen = watch_once(model, [("stages", "out")])
    model(torch.randn(2, 3, 8, 8))
    assert list(seen) == [("stages", "out")] and calls == [1] and model.forward is mine
    seen.clear()
    model(torch.randn(2, 3, 8, 8))
    assert not seen
    watch_once(model, [("stages", "out")])
    unwatch(model)
    assert model.forward is mine


def test_evaluating_gives_each_module_its_mode_back():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).train()
    model[0].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(m.training for m in model.modules())
        _ = 1 / 0
    assert [m.training for m in model.modules()] == [True, False, True]
