"""Lets Jupyter fork kernels from the server of `kdfast.kernels.client`: the kernel `kdfast-warm` in the folder kernels/.

Beside this provisioner, that kernel's command differs from ipykernel's own in two arguments: no history file, which
many kernels at once would lock each other out of (nbclient does the same for the kernel `python3`), and no polling for
the death of a parent, which is the server here. The server ends the kernel when the process that asked for it dies.
"""

import asyncio
import os
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner

from kdfast.kernels.client import Forked


class WarmProvisioner(LocalProvisioner):
    """Jupyter's own for local processes, on a process of another make."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        _python, _dash_m, *argv = cmd
        self.cwd = os.path.abspath(kwargs.get("cwd") or os.curdir)
        # ipykernel sets this, but matplotlib looks at it when imported, which in a forked kernel was before.
        env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", **kwargs["env"]}
        with open(os.devnull) as nothing:
            self.process = Forked(argv, self.cwd, env, (nothing.fileno(), 1, 2))
        self.pid = self.process.pid
        return self.connection_info

    async def shutdown_requested(self, restart: bool = False) -> None:
        """Wait a moment for the kernel to end: its manager would look only every tenth of a second."""
        for _ in range(100):
            if await self.poll() is not None:
                return
            await asyncio.sleep(0.005)
