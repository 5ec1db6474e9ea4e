"""Runs forked from the warm server: like `python -m`, only sooner, and gone when their caller is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock
from jupyter_client.manager import start_new_kernel

from kdfast.kernels.client import HERE, Forked, socket_path

REPORT = """
import os, random, sys
import numpy, threadpoolctl, torch
threads = {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpoolctl.threadpool_info())}
print(os.getppid(), os.getcwd(), os.environ.get("FRUIT"), sys.argv[1:], *threads, sep="|")
print(random.random(), numpy.random.rand(), torch.rand(1).item())
print(sys.stdin.read().upper(), file=sys.stderr)
"""


class Warm:
    """Calls `python -m kdfast.kernels.client` in a folder of its own, with servers of its own."""

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        self.sockets = folder / "sockets"
        self.sockets.mkdir(mode=0o700)
        ours = ("OMP_NUM_THREADS", "MPLBACKEND", "KDFAST_OWNER")  # what the tests themselves may run under
        self.environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.environment |= {"KDFAST_WARM_DIR": str(self.sockets), **environment}
        (folder / "report.py").write_text(REPORT)

    def start(self, *argv: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "kdfast.kernels.client", *argv],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str, stdin: str = "", **environment: str) -> tuple[int, str, str]:
        process = self.start(*argv, **environment)
        out, err = process.communicate(stdin, timeout=100)
        return process.returncode, out, err

    def run_code(self, code: str) -> tuple[int, str, str]:
        (self.folder / "program.py").write_text(code)
        return self.run("program")

    def server(self) -> psutil.Process:
        code, out, err = self.run("report")
        assert code == 0, err
        return psutil.Process(int(out.split("|")[0]))

    def notebook(self, *cells: str) -> str:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.cells[0].metadata["tags"] = ["parameters"]
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, self.folder / "in.ipynb")
        return "papermill in.ipynb out.ipynb -k kdfast-warm --no-progress-bar"

    def start_long_notebook(self, **environment: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
        """A client, and the processes (papermill, its kernel) that the server forked for it."""
        server = self.server()
        begun = self.folder / "begun"
        begun.unlink(missing_ok=True)
        call = self.notebook("path = ''", "import time, pathlib; pathlib.Path(path).touch(); time.sleep(100)")
        client = self.start(*call.split(), "-p", "path", str(begun), **environment)
        eventually(begun.exists)
        forked = server.children()
        assert len(forked) == 2
        return client, forked

    def socket(self) -> Path:
        (socket,) = self.sockets.glob("*.sock")
        return socket


def eventually(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(is_gone(process) for process in processes)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    warm = Warm(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.run("--stop")


ENGINES = pytest.mark.parametrize("engine", ["nbclient", "kdfast-warm"])


@ENGINES
def test_a_forked_kernel_runs_a_notebook_and_shows_what_a_fresh_one_shows(warm, engine):
    call = warm.notebook(
        "seed = 1",
        "import sys; print(seed + 1, 'fastai.vision.all' in sys.modules)",
        "import matplotlib.pyplot as plt; plt.plot([1, 2]);",
        "import pandas as pd; from fastai.callback.progress import master_bar\n"
        "print(pd.get_option('display.max_columns'), master_bar.__name__)",
    )
    code, _, err = warm.run(*call.split(), "--engine", engine, "-p", "seed", "41")
    assert code == 0, err
    _, _, imported, figure, shown = nbformat.read(warm.folder / "out.ipynb", 4).cells
    assert imported.outputs[0].text == "42 True\n"  # parameters arrived, and fastai was there without an import
    assert "image/png" in figure.outputs[0].data
    assert shown.outputs[0].text == "20 NBMasterBar\n"


@ENGINES
def test_a_failing_notebook_fails_the_client_and_is_written_with_its_traceback(warm, engine):
    code, _, err = warm.run(*warm.notebook("seed = 1", "raise ValueError('out of paint')").split(), "--engine", engine)
    assert code == 1
    assert "PapermillExecutionError" in err and "out of paint" in err
    outputs = [output for cell in nbformat.read(warm.folder / "out.ipynb", 4).cells for output in cell.get("outputs", [])]
    assert any(output.output_type == "error" and output.evalue == "out of paint" for output in outputs)


def test_a_long_notebook_is_written_while_it_runs(warm):
    call = warm.notebook("seed = 1", "print('begun'); import time; time.sleep(1.5)", "seed", "time.sleep(100)")
    client = warm.start(*call.split(), "--engine", "kdfast-warm")
    out = warm.folder / "out.ipynb"
    out.unlink(missing_ok=True)
    eventually(lambda: out.is_file() and "begun" in out.read_text())
    assert client.poll() is None
    client.kill()
    client.communicate()


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("raise ValueError('out of paint')", 1, "ValueError: out of paint\n"),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no paint')", 1, "no paint\n"),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
        ("import os; os.kill(os.getpid(), 15)", 128 + 15, ""),
    ],
)
def test_exit_code_and_stderr_are_those_of_the_module(warm, source, code, message):
    got, _, err = warm.run_code(source)
    assert got == code
    assert err.endswith(message) if message else not err


def test_folder_environment_arguments_and_streams_are_the_callers(warm):
    code, out, err = warm.run("report", "a b", "ü", stdin="quince", FRUIT="pear", OMP_NUM_THREADS="1")
    assert code == 0
    assert out.splitlines()[0].split("|")[1:] == [str(warm.folder), "pear", "['a b', 'ü']", "1"]
    assert err == "QUINCE\n"
    _, out, _ = warm.run("report")
    assert out.splitlines()[0].split("|")[2::2] == ["None", str(len(os.sched_getaffinity(0)))]


def test_two_children_draw_different_random_numbers(warm):
    draws = [warm.run("report")[1].splitlines()[1].split() for _ in range(2)]
    assert len(draws[0]) == 3
    assert not set(draws[0]) & set(draws[1])


def test_a_child_imports_kdfast_as_it_is_now_and_has_the_operators_of_torchvision(warm, monkeypatch):
    monkeypatch.setenv("KDFAST_WARM_DIR", str(warm.sockets))
    folder = warm.folder / "elsewhere"
    (folder / "kdfast").mkdir(parents=True)
    (folder / "kdfast" / "__init__.py").write_text("flavour = 'another'")
    (folder / "taste.py").write_text("import kdfast, torch; print(kdfast.flavour, torch.ops.torchvision.nms)")
    with (folder / "out").open("w+") as out:
        assert Forked(["taste"], str(folder), warm.environment, (0, out.fileno(), 2)).wait() == 0
    assert (folder / "out").read_text() == "another torchvision.nms\n"


def test_the_server_has_one_thread(warm):
    assert warm.server().num_threads() == 1


def test_the_client_imports_nothing_heavy():
    heavy = {"numpy", "torch", "jupyter_client", "filelock"}
    code = f"import kdfast.kernels.client, sys; print(*{heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "\n"


def test_killing_the_client_kills_papermill_and_the_kernel(warm):
    client, forked = warm.start_long_notebook()
    client.kill()
    eventually(lambda: all_gone(forked))


def test_killing_the_owner_ends_the_client_papermill_and_the_kernel(warm):
    with subprocess.Popen(["sleep", "1000"]) as owner:
        client, forked = warm.start_long_notebook(KDFAST_OWNER=str(owner.pid))
        owner.kill()
        assert client.wait(30) != 0
        eventually(lambda: all_gone(forked))


def test_what_a_run_leaves_behind_is_killed(warm):
    _, out, _ = warm.run_code("import subprocess; print(subprocess.Popen(['sleep', '1000'], stdout=2).pid)")
    eventually(lambda: not psutil.pid_exists(int(out)) or is_gone(psutil.Process(int(out))))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_client_ends_papermill_and_the_kernel(warm, signum):
    client, forked = warm.start_long_notebook()
    client.send_signal(signum)
    assert client.wait(30) != 0
    eventually(lambda: all_gone(forked))


def test_a_forked_kernel_can_be_interrupted_and_goes_on(warm, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(HERE))
    monkeypatch.setenv("KDFAST_WARM_DIR", str(warm.sockets))
    manager, client = start_new_kernel(kernel_name="kdfast-warm")
    kernel = psutil.Process(manager.provisioner.pid)
    try:
        client.execute("print('begun'); import time; time.sleep(100)", stop_on_error=False)
        eventually(lambda: client.get_iopub_msg(timeout=30)["msg_type"] == "stream")
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
        assert client.execute_interactive("1 + 1", timeout=30)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    eventually(lambda: is_gone(kernel))


def test_clients_at_once_start_one_server_which_ends_when_idle(tmp_path, monkeypatch):
    warm = Warm(tmp_path, KDFAST_WARM_IDLE="1")
    monkeypatch.setenv("KDFAST_WARM_DIR", str(warm.sockets))
    with FileLock(socket_path().with_suffix(".lock")):  # all of them find no server, and are let go together
        clients = [warm.start("report") for _ in range(4)]
        time.sleep(1)
        assert not socket_path().exists()
    servers = {client.communicate("", timeout=100)[0].split("|")[0] for client in clients}
    assert len(servers) == 1
    server = psutil.Process(int(servers.pop()))
    eventually(lambda: is_gone(server))
    assert not socket_path().exists()


def test_a_server_is_reached_in_a_folder_deeper_than_a_sockets_address_may_be(tmp_path):
    folder = tmp_path / ("a" * 60) / ("b" * 60)
    folder.mkdir(parents=True)
    warm = Warm(folder)
    server = warm.server()
    assert len(str(warm.socket())) > 107 and warm.server() == server
    assert warm.run("--stop")[0] == 0 and is_gone(server)


def test_a_server_without_its_socket_ends(tmp_path):
    warm = Warm(tmp_path)
    server = warm.server()
    warm.socket().unlink()
    eventually(lambda: is_gone(server))


def test_a_server_that_cannot_start_is_reported_in_a_sentence(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ImportError('no bars today')")
    code, _, err = Warm(tmp_path).run("report")
    assert code == 1
    assert err == "kdfast.kernels.client: the warm server could not run report: ImportError: no bars today\n"


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    warm = Warm(tmp_path)
    warm.sockets.chmod(0o755)
    code, _, err = warm.run("report")
    assert code == 1
    assert err == f"kdfast.kernels.client: {warm.sockets} must be a folder of your own that is closed to others (chmod 700)\n"


def test_an_owner_that_is_gone_is_reported_in_a_sentence(tmp_path):
    with subprocess.Popen(["true"]) as owner:
        pass
    code, _, err = Warm(tmp_path).run("report", KDFAST_OWNER=str(owner.pid))
    assert code == 1
    assert err == f"kdfast.kernels.client: KDFAST_OWNER is '{owner.pid}', which is not the number of a running process\n"


def test_when_the_server_is_killed_its_runs_die_and_the_client_says_so(warm):
    client, forked = warm.start_long_notebook()
    warm.server().kill()
    assert client.wait(30) == 128 + signal.SIGKILL
    eventually(lambda: all_gone(forked))


def test_stop_ends_the_server_and_its_runs(warm):
    client, forked = warm.start_long_notebook()
    server = warm.server()
    assert warm.run("--stop") == (0, "", "")
    eventually(lambda: all_gone([server, *forked]), seconds=1)
    assert client.wait(30) != 0
    assert warm.run("--stop") == (0, "", "")
