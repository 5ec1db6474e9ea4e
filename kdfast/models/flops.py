"""What a network's forward computes and keeps, counted without computing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdfast.models.registry import count_parameters, create_model


@contextmanager
def unfused() -> Iterator[None]:
    """Attention step by step inside, so that what looks on sees its products; as it was afterwards."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@cache
def flops(name: str, n_classes: int, image_size: int) -> int:
    """Floating point operations of one image's forward; a multiply-add counts as two. Nothing is computed for it.

    Attention's fused paths, which the counter does not see into, are off.
    """
    image = torch.zeros(1, 3, image_size, image_size, device="meta")
    model = _without_weights(name, n_classes, image_size).eval()
    with unfused(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def network_costs(name: str, n_classes: int, image_size: int) -> dict[str, int]:
    """`flops` and `saved_bytes` (what a forward keeps for the backward) of one image, and `parameters`. Nothing is computed."""
    model, kept = _without_weights(name, n_classes, image_size), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        if not isinstance(tensor, nn.Parameter):
            kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(2, 3, image_size, image_size, device="meta"))  # two: a normalisation wants more than one value
    return {"flops": flops(name, n_classes, image_size), "saved_bytes": kept // 2, "parameters": count_parameters(model)}


def _without_weights(name: str, n_classes: int, image_size: int) -> nn.Module:
    try:
        with torch.device("meta"):
            return create_model(name, n_classes, image_size)
    except NotImplementedError:  # RegNet works out its widths with tensors
        with torch.random.fork_rng(devices=[]):
            return create_model(name, n_classes, image_size).to("meta")
