"""Operations against those that torchvision publishes with its weights."""

import pytest
import torch
from torchvision.models import get_model_weights

from kdfast.efficiency import flops


@pytest.mark.parametrize("name", ["resnet18", "densenet169", "swin_t", "vit_b_16", "regnet_y_800mf", "mobilenet_v3_small"])
def test_operations_are_twice_the_published_multiply_adds(name):
    published = get_model_weights(name).DEFAULT.meta["_ops"]  # 10⁹ multiply-adds at 224 pixels
    assert flops(name, 1000, 224) / 2e9 == pytest.approx(published, rel=0.01)


def test_counting_draws_no_random_numbers_and_leaves_attention_as_it_was():
    before, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    flops.cache_clear()
    flops("regnet_y_400mf", 10, 64)
    flops("mini_vit_s", 10, 8)
    assert torch.equal(before, torch.get_rng_state()) and torch.backends.mha.get_fastpath_enabled() == fast
