"""Networks by name, each with its family: two of one family make a same-architecture pair, others a cross-architecture one.

`mini_<name>` (`kdfast.models.mini`) for small images, papers' networks for CIFAR (`kdfast.models.cifar`) as `cifar_<name>`, and
every classifier of torchvision by its name.
All take float images (B, 3, H, W) and return logits (B, classes).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torchvision.models as tv
from torch import nn

from kdfast.core.errors import KdfastError, unknown
from kdfast.core.plugins import load_plugins
from kdfast.models import cifar, mini, pretrained


@dataclass(frozen=True)
class Architecture:
    """A network that can be built by name."""

    name: str
    family: str  # same family: same-architecture pair
    build: Callable[[int, int], nn.Module]  # (number of classes, image side in pixels) -> network with fresh weights


_REGISTRY: dict[str, Architecture] = {}


def register_model(name: str, family: str, build: Callable[[int, int], nn.Module]) -> None:
    """Make `build(n_classes, image_size)` available under `name` to papermill, study files and `create_model`."""
    _REGISTRY[name] = Architecture(name, family, build)


def _register_own() -> None:
    """mini_… and cifar_…"""

    def build(n_classes: int, image_size: int, name: str) -> nn.Module:
        if image_size < cifar.SIDE:
            raise KdfastError(f"cifar_{name} needs images of at least {cifar.SIDE} pixels a side, not {image_size}")
        return cifar.NETWORKS[name][1](n_classes)

    for name, (family, make) in mini.NETWORKS.items():
        register_model(f"mini_{name}", family, make)
    for name, (family, _) in cifar.NETWORKS.items():
        register_model(f"cifar_{name}", family, partial(build, name=name))


_register_own()


def _torchvision(name: str) -> Architecture:
    builder = tv.get_model_builder(name)
    family = builder.__module__.rsplit(".", 1)[1]

    def build(n_classes: int, image_size: int) -> nn.Module:
        options = inspect.signature(builder).parameters
        arguments = {"weights": None, "num_classes": n_classes}
        if name in ("googlenet", "inception_v3"):  # one output, not the auxiliary classifiers of 2014
            arguments |= {"aux_logits": False, "init_weights": True}
        if "image_size" in options or name.startswith("vit_"):
            arguments["image_size"] = image_size
        return builder(**arguments)

    return Architecture(name, family, build)


def model_names() -> list[str]:
    """All names that `create_model` knows."""
    return [*_REGISTRY, *tv.list_models(module=tv)]


def architecture(name: str) -> Architecture:
    """The architecture of that name; an unknown name raises a KdfastError with the nearest known."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name in tv.list_models(module=tv):
        return _torchvision(name)
    load_plugins()
    if name in _REGISTRY:
        return _REGISTRY[name]
    raise unknown("model", name, model_names())


def create_model(name: str, n_classes: int, image_size: int, weights: str = "", head: str = "linear") -> nn.Module:
    """A network, float images (B, 3, image_size, image_size) to logits (B, n_classes), with random weights unless told which.

    `weights` and `head`: see `kdfast.core.config.Training` and `kdfast.models.pretrained`.
    """
    model = architecture(name).build(n_classes, image_size)
    if weights or head != "linear":
        pretrained.adapt(model, name, weights, head)
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of weights, trained or not (buffers are not counted)."""
    return sum(p.numel() for p in model.parameters())
