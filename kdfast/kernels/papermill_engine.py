"""A papermill engine for runs of a few seconds: `papermill --engine kdfast-warm`.

papermill's own engine writes the notebook at the beginning and end of every cell, and jupyter_client's client listens for
0.2 s to whether a new kernel has fallen silent: together as long as a small run trains. This one writes at most once a
second and at the end, and listens for 20 ms. What is executed is the same.
"""

import time
from functools import partial

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from papermill.engines import NBClientEngine, NotebookExecutionManager

SAVE_EVERY_S, SILENCE_S = 1.0, 0.02


class QuickClient(AsyncKernelClient):
    """jupyter_client's, less patient with a channel that has nothing more to say while the kernel starts."""

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        channel = self.iopub_channel
        channel.get_msg = partial(_listen, channel.get_msg)
        try:
            await self._async_wait_for_ready(timeout)
        finally:
            del channel.get_msg


async def _listen(get_msg, timeout: float | None = None):
    return await get_msg(timeout=SILENCE_S)


class QuickManager(AsyncKernelManager):
    """Gives its kernel a QuickClient."""

    client_class = "kdfast.kernels.papermill_engine.QuickClient"
    client_factory = QuickClient


class WarmEngine(NBClientEngine):
    """papermill's engine with a QuickClient and fewer writes."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **kwargs):
        write, written = nb_man.save, time.monotonic()

        def save(**given) -> None:
            nonlocal written
            if time.monotonic() - written > SAVE_EVERY_S:
                write(**given)
                written = time.monotonic()

        nb_man.save = save
        try:
            return super().execute_managed_notebook(nb_man, kernel_name, kernel_manager_class=QuickManager, **kwargs)
        finally:
            del nb_man.save  # the end is written whatever happens
