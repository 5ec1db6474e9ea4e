"""The store: what it gives back, what it refuses, how it stays within its bounds and out of others' way."""

import multiprocessing
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from kdfast.core.errors import KdfastError
from kdfast.distill.cache import Cache, cache_folder

KEY = {"name": "teacher.data.train", "torch": "2.13.0", "threads": 1}
TENSORS = {"logits": torch.arange(12.0).reshape(4, 3), "pooled": torch.ones(4, 2, dtype=torch.float16)}


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path / "store")


@pytest.fixture
def file(store):
    store.write(KEY, "view-0000", TENSORS)
    return store.path(KEY, "view-0000")


def refused(store, key=KEY):
    """The one sentence with which a part is not used."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert store.read(key, "view-0000") is None
    (one,) = said
    return str(one.message)


def test_it_gives_back_what_was_written_bit_for_bit(store, file):
    found = store.read(KEY, "view-0000")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_what_is_read_is_mapped_not_loaded(store, tmp_path):
    code = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
def anonymous():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
before = anonymous()
with safe_open(sys.argv[1], "pt") as file:
    x = file.get_tensor("logits")
assert float(x.float().sum()) == 20_000_000
print(anonymous() - before)
"""
    store.write(KEY, "view-0000", {"logits": torch.ones(200_000, 100, dtype=torch.float32)})
    path = store.path(KEY, "view-0000")
    grown = int(subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True).stdout)
    assert path.stat().st_size > 80e6 and grown < 40e6


def test_another_key_finds_nothing(store, file):
    assert store.read(KEY | {"threads": 2}, "view-0000") is None and store.read(KEY, "view-0001") is None


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "header cut", "tensors cut", "last byte cut"])
def test_a_file_cut_short_is_refused(store, file, keep):
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    assert "is not used but computed again: it is cut short or no safetensors file" in refused(store)


def test_a_changed_tensor_is_refused(store, file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "its tensors were changed after they were written" in refused(store)


def test_a_changed_tensor_under_a_rewritten_header_is_refused(store, file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    file.write_bytes(save(TENSORS | {"logits": TENSORS["logits"] + 1}, metadata))
    assert "its tensors were changed" in refused(store)


def test_what_another_torch_made_is_refused_under_this_ones_name(store, file):
    other = KEY | {"torch": "2.12.0"}
    store.write(other, "view-0000", TENSORS)
    store.path(other, "view-0000").replace(file)
    assert "it was made for another torch" in refused(store)


def test_a_foreign_safetensors_file_is_refused(store, file):
    file.write_bytes(save(TENSORS))
    assert "it was made for another name, threads, torch" in refused(store)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    store = Cache(tmp_path / "s", limit_gb=3.5e-3)  # three of four
    big = {"logits": torch.zeros(250_000)}  # 1 MB
    keys = [KEY | {"name": name} for name in "abcd"]
    for i, key in enumerate(keys[:2]):
        store.write(key, "view-0000", big)
        os.utime(store.path(key, "view-0000").parent, (i, i))
    store.read(keys[0], "view-0000")  # used just now, so b goes
    for key in keys[2:]:
        store.write(key, "view-0000", big)
    assert [store.has(key, "view-0000") for key in keys] == [True, False, True, True]
    assert store.report().MB.sum() <= 3.5


def test_a_write_looks_at_all_entries_only_where_room_may_be_short(tmp_path, monkeypatch):
    store, looked = Cache(tmp_path / "s", limit_gb=4.5e-3), []
    whole = Cache.report
    monkeypatch.setattr(Cache, "report", lambda self: looked.append(1) or whole(self))
    for i in range(12):
        store.write(KEY | {"name": f"n{i}"}, "view-0000", {"logits": torch.zeros(250_000)})  # 1 MB
        held = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*.safetensors"))
        assert held <= 4.5e6
    assert 1 <= len(looked) <= 9  # not at 2, 3 and 4
    (tmp_path / "s" / ".held").write_text("nonsense")
    store.write(KEY, "view-0000", {"logits": torch.zeros(250_000)})
    assert int((tmp_path / "s" / ".held").read_text()) == pytest.approx(4e6, rel=0.01)


def test_more_than_the_limit_is_not_written(tmp_path):
    store = Cache(tmp_path / "s", limit_gb=1e-3)
    with pytest.raises(OSError, match=r"more than its limit of 0\.001 GB"):
        store.write(KEY, "view-0000", {"logits": torch.zeros(1_000_000)})
    assert not store.has(KEY, "view-0000") and not list((tmp_path / "s").rglob("*.partial"))


def test_the_limit_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KDFAST_CACHE_GB", "1.5")
    assert Cache(tmp_path).limit == 1_500_000_000
    monkeypatch.setenv("KDFAST_CACHE_GB", "plenty")
    with pytest.raises(KdfastError, match="KDFAST_CACHE_GB must be a number of gigabytes, not 'plenty'"):
        Cache(tmp_path)


def test_several_checkouts_may_share_one(monkeypatch, tmp_path):
    assert cache_folder(tmp_path) == tmp_path / ".teacher_outputs"
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path / "shared"))
    assert cache_folder(tmp_path) == tmp_path / "shared"


def test_names_cannot_leave_the_folder(store):
    path = store.path({"name": "../../etc/passwd"}, "view-0000")
    assert path.resolve().parents[1] == store.folder.resolve()


def hold(folder, key, ready):
    with Cache(folder).lock(key, "view-0000") as mine:
        assert mine
        ready.set()
        time.sleep(60)


def test_one_process_makes_a_part_and_a_killed_one_does_not_keep_the_right(store):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(store.folder, KEY, ready))
    process.start()
    assert ready.wait(60)
    with store.lock(KEY, "view-0000") as mine:
        assert not mine
    with store.lock(KEY, "view-0001") as mine:
        assert mine
    process.kill()
    process.join()
    with store.lock(KEY, "view-0000") as mine:
        assert mine


def test_the_report_names_what_is_held(store, file):
    store.write(KEY, "view-0001", TENSORS)
    (row,) = store.report().itertuples()
    assert (row.name, row.parts) == ("teacher.data.train", 2) and pytest.approx(2 * file.stat().st_size / 1e6) == row.MB
    assert store.clear() == 1 and store.report().empty


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk):
    store = Cache(small_disk / "s")
    with pytest.raises(OSError, match="No space left"):
        store.write(KEY, "view-0000", {"logits": torch.rand(100_000)})
    assert not [path for path in small_disk.rglob("*") if path.is_file() and path.name != ".held"]
    store.write(KEY, "view-0000", {"logits": torch.rand(100)})
    assert store.read(KEY, "view-0000") is not None


def test_a_store_that_may_only_be_read_serves(small_disk):
    store = Cache(small_disk / "s")
    store.write(KEY, "view-0000", TENSORS)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert torch.equal(store.read(KEY, "view-0000")["logits"], TENSORS["logits"])
    with pytest.raises(OSError, match="Read-only"):
        store.write(KEY, "view-0001", TENSORS)
