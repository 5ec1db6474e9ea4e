"""Weights to begin with, and the classifier on top of them.

What comes from outside is read without running any of it: safetensors, or torch's files with `weights_only=True`.
"""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
import torchvision.models as tv
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdfast.core.errors import KdfastError, unknown

State = dict[str, Tensor]
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # classifiers of googlenet and inception_v3 that are not built
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])(?=\.)")  # its files have a dot that names now lack


def adapt(model: nn.Module, name: str, weights: str, head: str) -> None:
    """Load `weights` into a network whose classifier is fresh where it does not fit, and give it the `head`, in place.

    `weights`: "" none; `imagenet` or `imagenet:IMAGENET1K_V1` torchvision's (downloaded once, hash checked); or the path of
    a .safetensors or .pth file. `head` mlp: Linear(in, in/2), ReLU, Dropout(0.4), Linear(in/2, classes) in place of the last
    linear layer. A KdfastError says what does not fit.
    """
    where = _classifier(model, name)
    state: State = {}
    if weights:
        state = _imagenet(name, weights) if weights.partition(":")[0] == "imagenet" else read_weights(Path(weights))
    if head == "mlp":
        _replace(model, where)
        where += "."
        state = {k: v for k, v in state.items() if not k.startswith(where) or k in model.state_dict()}
    if state:
        _load(model, state, where, weights)


def read_weights(path: Path) -> State:
    """A file's state dict, flat or under the name `state_dict` or `model`."""
    path = path.expanduser()
    if not path.is_file():
        raise KdfastError(f"no weights at {path}: give imagenet, or the path of a .safetensors or .pth file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state.get(key, state) if isinstance(state, dict) else {}
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError, SafetensorError) as error:
        raise KdfastError(
            f"{path} holds no weights that can be read safely ({type(error).__name__}): give a state dict"
        ) from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise KdfastError(f"{path} holds no state dict (names to tensors): save model.state_dict()")
    return state


def load_weights(model: nn.Module, state: State, ours: State | None = None) -> None:
    """`load_state_dict` of plain tensors by name, which must be the model's, all of them unless `ours` has the others.

    Through the model's own state dict, for that carries the versions of its layers: MNASNet loads nothing without them.
    """
    own = model.state_dict() if ours is None else ours
    odd = set(state) ^ set(own) if ours is None else set()
    if odd:
        raise KdfastError(f"the weights do not fit the network: only one of them has {min(odd)}")
    for key in state:
        own[key] = state[key]
    model.load_state_dict(own)


def _imagenet(name: str, weights: str) -> State:
    version = weights.partition(":")[2] or "DEFAULT"
    try:
        known = tv.get_model_weights(name)
    except ValueError:
        raise KdfastError(f"torchvision has no ImageNet weights of {name}: leave weights empty, or give a file") from None
    if version not in known.__members__:
        raise unknown("ImageNet weights", version, known.__members__, name)
    try:
        state = known[version].get_state_dict(progress=True, check_hash=True, weights_only=True)
        return {DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    except (EOFError, RuntimeError, UnpicklingError, AttributeError) as error:
        kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(known[version].url).name
        raise KdfastError(f"the ImageNet weights of {name} in {kept} are damaged ({type(error).__name__}): remove them") from None
    except OSError as error:
        raise KdfastError(f"the ImageNet weights of {name} could not be downloaded ({error}): {known[version].url}") from None


def _classifier(model: nn.Module, name: str) -> str:
    """The path of the last linear layer."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise KdfastError(f"{name} ends in no linear classifier: weights and head are not offered for it")
    return linear[-1]


def _replace(model: nn.Module, where: str) -> None:
    old = model.get_submodule(where)
    half = old.in_features // 2
    hidden = nn.Linear(old.in_features, half), nn.ReLU(), nn.Dropout(0.4), nn.Linear(half, old.out_features)
    parent, _, leaf = where.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(*hidden))


def _load(model: nn.Module, state: State, where: str, weights: str) -> None:
    """All but the classifier must fit, and nothing be left over but auxiliary classifiers."""
    ours, head = model.state_dict(), where.removesuffix(".") + "."
    for key in state:
        if key not in ours and not (isinstance(key, str) and key.startswith((head, *AUXILIARY))):
            raise KdfastError(f"{weights} has {key}, which this network has not: it is of another network")
    for key, value in ours.items():
        theirs = state.get(key)
        if key.startswith(head) or (theirs is None and key.endswith("num_batches_tracked")):
            continue  # a counter that old files lack
        if theirs is None:
            raise KdfastError(f"{weights} has no weights named {key}: it is of another network")
        if theirs.shape != value.shape:
            shapes = f"{tuple(theirs.shape)}, not {tuple(value.shape)}"
            raise KdfastError(f"{weights} has {key} of shape {shapes}: it is of another network or image size")
    load_weights(model, {key: value for key, value in state.items() if key in ours and value.shape == ours[key].shape}, ours)
