"""What a network costs to run."""

from functools import cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdfast.models import create_model


@cache
def flops(name: str, n_classes: int, image_size: int) -> int:
    """Floating point operations of one image's forward; a multiply-add counts as two. Nothing is computed for it.

    Attention's fused paths, which the counter does not see into, are off.
    """
    image = torch.zeros(1, 3, image_size, image_size, device="meta")
    model = _without_weights(name, n_classes, image_size).eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def _without_weights(name: str, n_classes: int, image_size: int) -> nn.Module:
    try:
        with torch.device("meta"):
            return create_model(name, n_classes, image_size)
    except NotImplementedError:  # RegNet works out its widths with tensors
        with torch.random.fork_rng(devices=[]):
            return create_model(name, n_classes, image_size).to("meta")
