"""Runs `python -m MODULE …` in a process forked from one that has already imported torch, fastai and papermill.

    python -m kdfast.kernels.client papermill in.ipynb out.ipynb -k kdfast-warm

Those imports cost a run seven to nine seconds, and a study is hundreds of runs of a few seconds. The first call starts
a server that has done them. It forks a child for every call, which takes over the caller's folder, environment, import
path and standard streams, and it ends when nobody has called for two minutes. No run outlives its caller: when the
caller's connection closes, the server ends the run.

On the socket: the caller sends one line of JSON with its standard streams attached, and later a byte for every signal
to pass on. It receives the child's pid and, when the child has ended, its exit code, four bytes each.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdfast.core import gpus
from kdfast.core.errors import KdfastError, number_given

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # pools break in a fork
READ_AT_IMPORT = ("JPY_PARENT_PID", "MPLBACKEND")  # by ipykernel and matplotlib: the first caller's are not everyone's
HERE = Path(__file__).parents[1]  # the package; also an entry for JUPYTER_PATH: it holds kernels/
SHARED = ("kernels/client", "kernels/server", "kernels/papermill_engine", "models/_torchvision")  # what the server has of kdfast


def socket_path() -> Path:
    """The address of the server for this Python and its packages, in a folder that nobody else can enter."""
    folder = Path(os.environ.get("KDFAST_WARM_DIR") or f"{os.environ.get('TMPDIR', '/tmp')}/kdfast-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
        raise KdfastError(f"{folder} must be a folder of your own that is closed to others (chmod 700)")
    import site
    from hashlib import sha256

    # Installing any package, torch say, changes the folder of packages. A hash seed holds from Python's start on, and
    # a cluster's job takes the processes that it started with it. Checkouts with the same sources share a server: what a
    # run imports of kdfast beside these, it imports itself.
    sources = [(HERE / f"{name}.py").read_bytes() for name in SHARED]
    changes = [os.stat(file).st_mtime_ns for file in site.getsitepackages()]
    fixed = [os.environ.get(name) for name in ("PYTHONHASHSEED", *gpus.JOB)]
    key = sha256(repr((sys.executable, sys.prefix, sources, changes, fixed)).encode()).hexdigest()[:16]
    return folder / f"{key}.sock"


@contextmanager
def short(path: Path) -> Iterator[str]:
    """Another name of a socket: one in a deep folder is longer than the 107 bytes that Linux allows an address."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect(path: Path) -> socket.socket | None:
    server = socket.socket(socket.AF_UNIX)
    try:
        with short(path) as address:
            server.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        server.close()
        return None
    return server


def start_server(path: Path) -> socket.socket:
    """Connect to a new server. Its socket is opened here, so that callers can queue there while the server imports."""
    import subprocess

    from filelock import FileLock

    with FileLock(path.with_suffix(".lock")):
        if server := connect(path):  # somebody else was quicker
            return server
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener, path.with_suffix(".log").open("wb") as log:
            with short(path) as address:
                listener.bind(address)
            listener.listen(256)
            subprocess.Popen(
                [sys.executable, "-m", "kdfast.kernels.server", str(listener.fileno()), str(path)],
                env={name: value for name, value in os.environ.items() if name not in READ_AT_IMPORT} | ONE_THREAD,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
            server = connect(path)
            assert server  # queued with the listener that is open here
            return server


class Forked:
    """A run in a child of the server, to be used like a `subprocess.Popen`. It ends when its connection is closed."""

    stdin = stdout = stderr = None

    def __init__(self, argv: list[str], cwd: str, env: dict[str, str], streams: tuple[int, int, int] = (0, 1, 2)):
        path = socket_path()
        self._server = connect(path) or start_server(path)
        self.returncode: int | None = None
        request = {
            "argv": argv,
            "cwd": cwd,
            "env": env,
            "path": [cwd, *sys.path[1:]],  # `python -m` puts the folder in which it is called first
            "cpus": sorted(os.sched_getaffinity(0)),
        }
        with suppress(BrokenPipeError, ConnectionResetError):  # reported below
            socket.send_fds(self._server, [b"\n"], streams)
            self._server.sendall(json.dumps(request).encode() + b"\n")
        pid = self._receive()
        if pid is None:
            last_line = path.with_suffix(".log").read_text(errors="replace").strip().rpartition("\n")[2]
            raise KdfastError(f"the warm server could not run {argv[0]}: {last_line or 'it was killed'}")
        self.pid = pid

    def _receive(self, flags: int = socket.MSG_WAITALL) -> int | None:
        with suppress(ConnectionResetError):
            if number := self._server.recv(4, flags):
                return int.from_bytes(number, "little", signed=True)
        return None

    def fileno(self) -> int:
        return self._server.fileno()

    def poll(self) -> int | None:
        with suppress(BlockingIOError):
            return self.wait(socket.MSG_DONTWAIT)
        return None

    def wait(self, flags: int = socket.MSG_WAITALL) -> int:
        if self.returncode is None:
            code = self._receive(flags)
            self.returncode = -signal.SIGKILL if code is None else code  # if the server was killed, it died of that
            self._server.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        with suppress(OSError):  # it has ended
            self._server.send(bytes([signum]))

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def abandon(self) -> None:
        """End it as the caller's own death would, and still learn its exit code."""
        self._server.shutdown(socket.SHUT_WR)


def prepare() -> None:
    """Have a server begin its imports now, for those who will call soon."""
    path = socket_path()
    (connect(path) or start_server(path)).close()


def run(argv: list[str]) -> int:
    """Run `python -m argv` in a child of the server; return its exit code as a shell would.

    Where there are GPUs it has one of its own, or as many as KDFAST_GPUS says.
    """
    with gpus.taken(int(number_given("KDFAST_GPUS", 1, "GPUs"))) as added:
        return _run(argv, added)


def _run(argv: list[str], added: dict[str, str]) -> int:
    owner = os.environ.get("KDFAST_OWNER")  # a workflow engine that is killed with SIGKILL cannot end its runs itself
    try:
        owners = [os.pidfd_open(int(owner))] if owner else []
    except (ValueError, ProcessLookupError):
        raise KdfastError(f"KDFAST_OWNER is {owner!r}, which is not the number of a running process") from None
    jupyter_path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("JUPYTER_PATH"))))
    process = Forked(argv, os.getcwd(), {**os.environ, **added, "JUPYTER_PATH": jupyter_path})
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: process.send_signal(number))
    ended, _, _ = select.select([process, *owners], [], [])
    if process not in ended:
        process.abandon()
    code = process.wait()
    return code if code >= 0 else 128 - code


def stop() -> None:
    """End the server and all its runs, if there is a server."""
    if server := connect(socket_path()):
        with server, open(os.devnull) as nothing:
            socket.send_fds(server, [b"\n"], [nothing.fileno()])
            server.sendall(b'{"argv": []}\n')
            server.recv(1)  # nothing comes but the end


def main(argv: list[str]) -> int:
    if argv == ["--stop"]:
        stop()
    elif argv and not argv[0].startswith("-"):
        return run(argv)
    else:
        raise KdfastError("say which module to run, or --stop: python -m kdfast.kernels.client MODULE [ARGUMENT …]")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KdfastError as error:
        sys.exit(f"kdfast.kernels.client: {error}")
    except KeyboardInterrupt:  # before there was a run to pass it on to
        sys.exit(128 + signal.SIGINT)
