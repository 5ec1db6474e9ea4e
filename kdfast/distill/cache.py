"""A folder of tensors by key: written whole, checked whenever opened, bounded in size, shared by any number of processes.

`<folder>/<name>-<hash of the key>/<part>.safetensors`. The key names everything that the tensors depend on; each file
holds it again, with a digest of its tensors, so that a file that is cut short, changed or put under a foreign name is
found out. Opened files are memory-mapped.
"""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdfast.core.errors import number_given
from kdfast.core.files import write_atomically

LIMIT_GB = 20.0  # unless KDFAST_CACHE_GB says otherwise
STALE_S = 3600  # a part that nobody has written to for so long was left by a killed process
HELD = ".held"  # a file in the cache: bytes held at the last look, and of each write since

Key = dict[str, Any]


def default_limit() -> float:
    """Gigabytes that a cache may hold: KDFAST_CACHE_GB, or 20. Raises KdfastError if it is no number."""
    return number_given("KDFAST_CACHE_GB", LIMIT_GB, "gigabytes")


def cache_folder(runs: str | Path) -> Path:
    """The cache beside the runs, `<runs>/.teacher_outputs`, unless KDFAST_CACHE names one that several checkouts share."""
    return Path(os.environ.get("KDFAST_CACHE") or Path(runs) / ".teacher_outputs").expanduser()


class Cache:
    """Tensors of a key, by part. Never needed: whoever cannot write to it goes on without."""

    def __init__(
        self,
        folder: str | Path,  # made when first written to
        limit_gb: float | None = None,  # where more is written, what was used longest ago goes; None: `default_limit`
    ):
        self.folder = Path(folder)
        self.limit = int(1e9 * (default_limit() if limit_gb is None else limit_gb))

    def path(self, key: Key, part: str) -> Path:
        """Where the tensors of a part are, or would be."""
        digest = hashlib.sha256(_text(key).encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", str(key.get("name", "entry")))[:80].lstrip(".")
        return self.folder / f"{name}-{digest}" / f"{part}.safetensors"

    def read(self, key: Key, part: str) -> dict[str, Tensor] | None:
        """The tensors, memory-mapped; None where there are none or, with a warning that says why, none to be trusted."""
        path = self.path(key, part)
        try:
            tensors = _checked(path, key)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            warnings.warn(f"cached teacher outputs {path} is not used but computed again: {_reason(error)}", stacklevel=2)
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(path.parent)  # used just now
        return tensors

    def has(self, key: Key, part: str) -> bool:
        """Whether there is a file, sound or not."""
        return self.path(key, part).is_file()

    def write(self, key: Key, part: str, tensors: dict[str, Tensor]) -> None:
        """Write all or nothing, after making room. Raises OSError where that cannot be done."""
        path = self.path(key, part)
        content = save({k: v.contiguous() for k, v in tensors.items()}, {"key": _text(key), "sha256": _digest(tensors)})
        self._make_room(len(content), path.parent)
        write_atomically(path, content)

    @contextmanager
    def lock(self, key: Key, part: str) -> Iterator[bool]:
        """Whether the right to make this part is had, without waiting for it. A killed holder's is free again."""
        path = self.path(key, part).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)  # whoever holds the unlinked file looks for the part before making it
            lock.release()

    def report(self) -> pd.DataFrame:
        """One row an entry: name, parts, megabytes, when last used, folder; the longest unused first."""
        rows = []
        for entry in self.folder.glob("[!.]*") if self.folder.is_dir() else ():
            files = list(entry.glob("*.safetensors"))
            size = sum(file.stat().st_size for file in files)
            used = datetime.fromtimestamp(entry.stat().st_mtime)
            rows.append(
                {"name": entry.name.rpartition("-")[0], "parts": len(files), "MB": size / 1e6, "used": used, "folder": entry}
            )
        table = pd.DataFrame(rows, columns=["name", "parts", "MB", "used", "folder"])
        return table.sort_values("used", ignore_index=True)

    def damaged(self) -> Iterator[tuple[Path, str]]:
        """Every file that would not be used, and why."""
        for path in sorted(self.folder.glob("*/*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    key = json.loads((file.metadata() or {}).get("key", "{}"))
                _checked(path, key)
                if self.path(key, path.stem) != path:
                    raise ValueError("it lies under another key's name")
            except (OSError, SafetensorError, ValueError) as error:
                yield path, _reason(error)

    def clear(self) -> int:
        """Remove every entry; returns how many. Runs that have one open keep it."""
        entries = list(self.report().folder)
        for entry in entries:
            shutil.rmtree(entry, ignore_errors=True)
        (self.folder / HELD).unlink(missing_ok=True)
        return len(entries)

    def _make_room(self, needed: int, own: Path) -> None:
        """Remove what was used longest ago until `needed` bytes fit; OSError if they do not, beside the entry itself.

        To look at every entry at every write would take a large study longer than its runs: as long as what was noted of the
        writes since the last look says that there is room, nobody looks.
        """
        if self._noted() + needed <= self.limit:
            with (self.folder / HELD).open("a") as noted:
                noted.write(f"{needed}\n")
            return
        for stale in self.folder.glob("*/.*.partial"):
            if time.time() - stale.stat().st_mtime > STALE_S:
                stale.unlink(missing_ok=True)
        table = self.report()
        total = 1e6 * table.MB.sum() + needed
        for row in table.itertuples():
            if total <= self.limit:
                break
            if row.folder != own:
                shutil.rmtree(row.folder, ignore_errors=True)
                total -= 1e6 * row.MB
        if total > self.limit:
            raise OSError(f"it would hold more than its limit of {self.limit / 1e9:g} GB (KDFAST_CACHE_GB)")
        write_atomically(self.folder / HELD, f"{total:.0f}\n".encode())

    def _noted(self) -> float:
        """Bytes at the last look and of all writes since; infinity where that is not known."""
        try:
            return sum(int(line) for line in (self.folder / HELD).read_text().split()) or float("inf")
        except (OSError, ValueError):
            return float("inf")


def _checked(path: Path, key: Key) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        _check_key(metadata.get("key"), key)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError("its tensors were changed after they were written")
    return tensors


def _check_key(found: str | None, key: Key) -> None:
    if found != _text(key):
        theirs = json.loads(found or "{}")
        other = [name for name in sorted({*theirs, *key}) if theirs.get(name) != key.get(name)]
        raise ValueError(f"it was made for another {', '.join(other)}")


def _reason(error: Exception) -> str:
    return "it is cut short or no safetensors file" if isinstance(error, SafetensorError) else str(error)


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
