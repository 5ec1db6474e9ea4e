"""The distillation losses as pure functions of tensors, for any training loop: see `kdfast.distill.losses`."""

from kdfast.distill.losses import *  # noqa: F403
from kdfast.distill.losses import __all__  # noqa: F401
