"""Files written whole or not at all."""

import os
import tempfile
from pathlib import Path

from kdfast.core.errors import KdfastError


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """A KdfastError where `folder`, or what will hold it, cannot be written to; known before hours of training, not after."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise KdfastError(f"{folder} cannot be written ({error.strerror or error}): choose another folder for runs") from None
