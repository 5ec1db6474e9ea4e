"""Image files to bytes of one size, decoded once and kept.

A decoded set lies in `runs/.decoded` (`KDFAST_DECODED` names another folder); its key is every file's path, size and time of
change, so that a file that was edited is read again. What cannot be kept is decoded anew by every run.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdfast.core.errors import KdfastError
from kdfast.core.files import write_atomically
from kdfast.core.provenance import RUNS

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
LONGEST = 30  # times the shorter side; what is narrower would fill the memory when scaled
READER = 2  # counts up when the same file is read to other bytes
WORTH_KEEPING = 1000  # images; fewer are decoded in no time


def read_images(files: Sequence[Path], size: int, resize: int = 0) -> Tensor:
    """Images as uint8 (N, 3, size, size): shorter side scaled to `resize` (0: `size`) pixels, centre crop, RGB.

    Raises a KdfastError for a file that is no image, and where they do not fit into memory.
    """
    _check_memory(files, size)
    kept = _kept(files, size, resize) if len(files) >= WORTH_KEEPING else None
    if kept is not None and kept.is_file():
        with suppress(OSError, SafetensorError, KeyError):  # damaged: made again below
            images = load(kept.read_bytes())["images"]
            if images.shape == (len(files), 3, size, size):
                return images
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(files):
        images[i] = _read(file, size, resize or size)
    if kept is not None:
        with suppress(OSError):  # a full or read-only disk costs time, not the run
            write_atomically(kept, save({"images": images}))
    return images


def _kept(files: Sequence[Path], size: int, resize: int) -> Path | None:
    digest = hashlib.sha256(f"{READER} {size} {resize} {Image.__version__}".encode())
    for file in files:
        try:
            found = file.stat()
        except OSError:
            return None  # reading it will say so
        digest.update(f"{file.resolve()}\0{found.st_size} {found.st_mtime_ns}\n".encode())
    return decoded_folder() / f"{digest.hexdigest()[:24]}.safetensors"


def decoded_folder() -> Path:
    """Where decoded images are kept."""
    return Path(os.environ.get("KDFAST_DECODED") or RUNS / ".decoded").expanduser()


def _check_memory(files: Sequence[Path], size: int) -> None:
    needed, free = 3 * len(files) * size * size, psutil.virtual_memory().available
    if 2 * needed > free:
        raise KdfastError(
            f"{len(files)} images of {os.path.commonpath(files)} at {size} pixels need {2 * needed / 2**30:.1f} GiB of memory "
            f"and {free / 2**30:.1f} are free: choose a smaller image_size"
        )


def _read(file: Path, size: int, resize: int) -> Tensor:
    """One image as uint8 (3, size, size): shorter side scaled to `resize`, centre crop."""
    try:
        with Image.open(file) as image:
            image = _rgb(image)
    except FileNotFoundError:
        raise KdfastError(f"image {file} is missing: restore it, or take it off its list") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise KdfastError(f"cannot read image {file} ({error}): replace it or remove it") from None
    if max(image.size) > LONGEST * min(image.size):
        raise KdfastError(f"image {file} is {image.width}×{image.height} pixels, too narrow to be a photo: remove it")
    scale = resize / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, in three channels of 8 bits; Pillow alone ignores how the camera was held and clips 16-bit grey to white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image).astype(np.int64), 0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")
