"""Random numbers of one's own: what is drawn inside changes nothing outside."""

import random

import numpy as np
import torch


class OwnStream:
    """A context in which torch draws from a stream of its own; torch, numpy and python are afterwards as they were.

    The stream starts where torch's default generators stand at the first entry and goes on from entry to entry, so that it
    follows the seed of the run without moving the run's own draws.
    """

    def __init__(self):
        self.mine = None

    def __enter__(self) -> "OwnStream":
        self.outside = random.getstate(), np.random.get_state(), torch_states()
        if self.mine is not None and len(self.mine) == len(self.outside[2]):
            set_torch_states(self.mine)
        return self

    def __exit__(self, *exception) -> None:
        self.mine = torch_states()
        python, numpy, torch_outside = self.outside
        random.setstate(python)
        np.random.set_state(numpy)
        set_torch_states(torch_outside)


def torch_states() -> list[torch.Tensor]:
    """The CPU generator's state, then each CUDA device's if CUDA is in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in devices)]


def set_torch_states(states: list[torch.Tensor]) -> None:
    """Take up what `torch_states` gave."""
    torch.set_rng_state(states[0])
    for i, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, i)
