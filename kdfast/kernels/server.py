"""The server of `kdfast.kernels.client`: imports what every run imports, then forks a child for every request.

Started by `kdfast.kernels.client` as `python -m kdfast.kernels.server SOCKET PATH`; SOCKET is the number of one that
listens at PATH.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Not papermill.cli, which looks at the standard streams when imported, nor matplotlib_inline, which looks for IPython's
# shell: the child imports them. Nor more of kdfast: a child sees the sources as they are when it starts.
PRELOADED = (
    "tqdm.auto",  # before ipykernel, beside which it thinks that it is in a notebook
    "torch",
    "torchvision",
    "fastai.vision.all",
    "matplotlib.pyplot",
    "pandas",
    "sklearn.datasets",
    "sklearn.metrics",
    "sklearn.model_selection",
    "scipy.stats",
    "safetensors.torch",
    "torchmetrics.functional.classification",
    "pydantic.json_schema",  # and with it what pydantic imports only when asked
    "filelock",
    "threadpoolctl",
    "tabulate",  # torch imports it when Python exits
    "click",
    "papermill.execute",
    "nbclient",
    "jupyter_client",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
)
IDLE_S = 120.0
GRACE_S = 2.0  # from SIGTERM to SIGKILL, for a run that has lost its caller

Request = dict[str, Any]
_kept: list[Any] = []


class Run:
    """A child of the server, from the fork until its exit code is sent."""

    def __init__(self, pid: int, caller: socket.socket):
        self.pid, self.pidfd, self.caller = pid, os.pidfd_open(pid), caller
        self.kill_at = float("inf")

    def send_signal(self, signum: int) -> None:
        try:
            os.killpg(self.pid, signum)  # nobody else's group: the number is the child's until it is waited for
        except ProcessLookupError:  # it has not made its group yet
            os.kill(self.pid, signum)

    def end(self) -> None:
        self.send_signal(signal.SIGTERM)
        self.kill_at = time.monotonic() + GRACE_S

    def close(self) -> None:
        os.close(self.pidfd)
        self.caller.close()


class Server:
    """One thread, since a fork keeps only the thread that calls it."""

    def __init__(self, listener: socket.socket, path: Path):
        self.listener, self.path, self.inode = listener, path, path.stat().st_ino
        self.idle_s = float(os.environ.get("KDFAST_WARM_IDLE") or IDLE_S)
        self.runs: set[Run] = set()
        self.stoppers: list[socket.socket] = []  # kept open: they learn that the server has ended when they are closed
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)

    def serve(self) -> Request | None:
        """Return a request in the child that is to fulfil it, and None in the server when nobody needs it any more."""
        quiet_since = time.monotonic()
        while True:
            for key, _ in self.selector.select(timeout=0.5)[:1]:  # just one: it may close what the next is about
                if request := key.data():
                    return request
            now = time.monotonic()
            for run in self.runs:
                if run.kill_at < now:
                    run.send_signal(signal.SIGKILL)
            if self.runs:
                quiet_since = now
            elif now - quiet_since > self.idle_s or not self.is_listed():
                self.unlist()
                if not self.selector.select(timeout=0):  # nobody has called before that
                    return None

    def is_listed(self) -> bool:
        with suppress(FileNotFoundError):
            return self.path.stat().st_ino == self.inode
        return False

    def unlist(self) -> None:
        if self.is_listed():
            self.path.unlink()

    def accept(self) -> Request | None:
        caller, _ = self.listener.accept()
        try:
            caller.settimeout(GRACE_S)
            _, streams, _, _ = socket.recv_fds(caller, 1, 3)
            request = json.loads(caller.makefile("rb").readline())
            caller.settimeout(None)
            pid = os.fork() if request["argv"] else None
        except (OSError, ValueError) as error:  # it was killed while it called, or there are too many processes
            print(f"a call failed: {error}", file=sys.stderr, flush=True)
            caller.close()
            return None
        if pid == 0:
            self.close()
            caller.close()
            return request | {"streams": streams}
        if pid:
            self.follow(Run(pid, caller))
        else:
            self.stop(caller)
        for stream in streams:
            os.close(stream)
        return None

    def follow(self, run: Run) -> None:
        self.runs.add(run)
        self.selector.register(run.caller, selectors.EVENT_READ, lambda: self.hear(run))
        self.selector.register(run.pidfd, selectors.EVENT_READ, lambda: self.bury(run))
        with suppress(OSError):  # that the caller is gone is for `hear` to find
            run.caller.sendall(run.pid.to_bytes(4, "little"))

    def hear(self, run: Run) -> None:
        signals = b""
        with suppress(ConnectionResetError):
            signals = run.caller.recv(64)
        for signum in signals:
            run.send_signal(signum)
        if not signals:
            self.selector.unregister(run.caller)
            run.end()

    def bury(self, run: Run) -> None:
        run.send_signal(signal.SIGKILL)  # whatever it left behind in its group
        code = os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1])
        with suppress(OSError):
            run.caller.sendall(code.to_bytes(4, "little", signed=True))
        for file in (run.pidfd, run.caller):
            with suppress(KeyError):  # a caller that is gone is watched no more
                self.selector.unregister(file)
        self.runs.remove(run)
        run.close()

    def stop(self, stopper: socket.socket) -> None:
        self.idle_s = 0.0
        self.stoppers.append(stopper)
        self.unlist()
        for run in self.runs:
            run.end()

    def close(self) -> None:
        """In a child: let go of the server's files, or a connection that the server closes would stay open."""
        for file in (self.selector, self.listener, *self.stoppers, *self.runs):
            file.close()


def become(request: Request) -> None:
    """Make this process what `python -m` would have been where the request was made."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the server, which could not end it any more
    os.setsid()
    take_streams(request["streams"], unbuffered=bool(request["env"].get("PYTHONUNBUFFERED")))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.sched_setaffinity(0, request["cpus"])
    time.tzset()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv[:], sys.path[:] = request["argv"], request["path"]


def take_streams(streams: list[int], unbuffered: bool) -> None:
    for number, (stream, name) in enumerate(zip(streams, ("stdin", "stdout", "stderr"), strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        old, by_line = getattr(sys, name), name == "stderr" or unbuffered or os.isatty(number)
        file = os.fdopen(number, "w" if number else "r", 1 if by_line else -1, old.encoding, old.errors, closefd=False)
        _kept.append(old)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def prepare_libraries(pools: Any, cpus: int) -> None:
    """Do what the libraries do at their import, for this environment; and seed them: children would draw the same."""
    import matplotlib
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()
    threads = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or cpus)
    pools.limit(limits=threads)
    torch.set_num_threads(threads)
    if backend := os.environ.get("MPLBACKEND"):
        matplotlib.rcParams["backend"] = backend


def prepare_kernel() -> None:
    """Settle what fastai and pandas settle at their import: that what they show, they show in a notebook.

    And leave out what ipykernel does at its end: it stops the thread to which another may be writing, which then both
    wait for ever. This process ends right after, and its sockets with it.
    """
    import pandas as pd
    from fastai.callback import progress
    from fastprogress.fastprogress import NBMasterBar, NBProgressBar
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.close = lambda self: None

    progress.master_bar, progress.progress_bar = NBMasterBar, NBProgressBar
    pd.set_option("display.max_columns", 20)


def run_and_exit(module: str) -> NoReturn:
    """End as Python does, but for the half second in which it would take the imported libraries apart."""
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone, or the run has closed it
            stream.flush()
    os._exit(code & 0xFF)


def preload() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    sys.modules["nbformat"].validator.get_validator(4, 5)  # compiles the schema of notebooks, and keeps it
    # A child imports kdfast anew, as it is then. The old modules live on: one of them owns torchvision's operators.
    _kept.extend(sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "kdfast")
    for finalizer in list(weakref.finalize._registry):  # torch's: a child that ends need not unregister its operators
        finalizer.atexit = False
    sys.path_importer_cache.clear()  # and with it what folders held
    os.chdir("/")  # the first caller may remove its own
    gc.freeze()  # a collection in a child would write to all the pages that it shares, and so copy them


def main(listener: int, path: Path) -> NoReturn:
    server = Server(socket.socket(fileno=listener), path)
    preload()
    pools = sys.modules["threadpoolctl"].ThreadpoolController()  # here, as to find them takes longer than a fork
    if request := server.serve():
        become(request)
        prepare_libraries(pools, cpus=len(request["cpus"]))
        if request["argv"][0] == "ipykernel_launcher":
            prepare_kernel()
        run_and_exit(request["argv"][0])
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
