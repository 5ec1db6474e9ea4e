"""Makes PyPI's torchvision importable beside a CPU-only torch.

PyPI's torchvision wheel is built for CUDA. Beside a CPU-only torch its compiled extension does not load, and
importing it fails all the same, because it registers fake kernels for two operators of that extension
(`torchvision::nms`, `torchvision::qnms`). Declaring them first cures that; nothing here calls them. It has to happen
before torchvision is first imported, and only if somebody imports it: hence an import hook.

`import kdfast` installs it. Since fastai may be imported before, an installed kdfast does so when Python starts, by a file
`kdfast_torchvision.pth` in site-packages. That one runs this file and does not import it: else every process would have the
installed kdfast already, where it should find that of the checkout it stands in.
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
    """A finder on sys.meta_path that acts when torchvision is executed; who only looks whether it is there loads no torch."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def declare_and_execute(module):
                _declare_missing_operators(spec.origin)
                execute(module)

            spec.loader.exec_module = declare_and_execute
        return spec


def install() -> None:
    """Register the hook, unless torchvision is imported already or the hook is there, maybe another kdfast's."""
    known = {type(finder).__name__ for finder in sys.meta_path}
    if "torchvision" not in sys.modules and _BeforeTorchvision.__name__ not in known:
        sys.meta_path.insert(0, _BeforeTorchvision())
