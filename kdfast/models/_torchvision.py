"""Makes PyPI's torchvision importable beside a CPU-only torch.

PyPI's torchvision wheel is built for CUDA. Beside a CPU-only torch its compiled extension does not load, and
importing it fails all the same, because it registers fake kernels for two operators of that extension
(`torchvision::nms`, `torchvision::qnms`). Declaring them first cures that; nothing here calls them. It has to happen
before torchvision is first imported, by fastai say, and only if somebody imports it: hence an import hook.
"""

import sys

_OPERATORS = ("nms", "qnms")
_keep = []  # a torch.library.Library takes its operators with it when it is collected


def _declare_missing_operators(init_file: str) -> None:
    from pathlib import Path

    import torch

    try:
        torch.ops.load_library(str(next(Path(init_file).parent.glob("_C*.so"))))
    except (OSError, StopIteration):  # no extension for this torch
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)


class _BeforeTorchvision:
    """A finder on sys.meta_path that acts once, when `torchvision` is looked for, and leaves finding it to the others."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from importlib.util import find_spec  # 30 ms that callers of kdfast.kernels.client need not wait for

            spec = find_spec("torchvision")
            if spec is not None:
                _declare_missing_operators(spec.origin)
        return None


def install() -> None:
    """Register the hook, unless torchvision is imported already or the hook is there."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
