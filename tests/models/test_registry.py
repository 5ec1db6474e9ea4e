"""Networks by name and their families."""

import pytest
import torch

from kdfast.core.errors import KdfastError
from kdfast.models.registry import architecture, count_parameters, create_model, model_names

MINIS = [name for name in model_names() if name.startswith("mini_")]


@pytest.mark.parametrize("name", MINIS)
@pytest.mark.parametrize("size", [8, 16])
def test_small_networks_give_a_logit_a_class_at_any_small_size(name, size):
    model = create_model(name, 7, size).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_families_grow_from_xs_to_xl():
    for family in ("resnet", "plain", "mobile"):
        counts = [count_parameters(create_model(f"mini_{family}_{size}", 10, 8)) for size in ("xs", "s", "m", "l", "xl")]
        assert counts == sorted(counts) and len(set(counts)) == 5
        assert {architecture(f"mini_{family}_{size}").family for size in ("xs", "xl")} == {family}


@pytest.mark.parametrize(
    ("name", "family", "millions"),
    [("resnet18", "resnet", 11.690), ("densenet169", "densenet", 14.149), ("swin_t", "swin_transformer", 28.288),
     ("mobilenet_v3_small", "mobilenetv3", 2.543), ("googlenet", "googlenet", 6.625), ("vit_b_32", "vision_transformer", 88.224)],
)  # fmt: skip
def test_torchvision_classifiers_are_known_by_name_with_their_published_size(name, family, millions):
    assert architecture(name).family == family
    with torch.device("meta"):
        model = create_model(name, 1000, 224)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=5e-4)


def test_every_torchvision_classifier_can_be_asked_for():
    assert {"resnet50", "regnet_y_16gf", "convnext_tiny", "vit_l_32", "inception_v3"} <= set(model_names())


def test_an_unknown_network_is_refused_with_the_nearest_names():
    with pytest.raises(KdfastError, match=r"unknown model 'resnet19'; the nearest known: .*resnet18"):
        architecture("resnet19")


def test_a_transformer_refuses_a_size_its_patches_do_not_divide():
    with pytest.raises(KdfastError, match="divisible by 4, not 10"):
        create_model("mini_vit_s", 10, 10)
