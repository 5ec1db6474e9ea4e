"""Why a run failed, in one sentence: from its notebook, from what it said, or from the disk."""

import json
import re
import shutil
import sys
from pathlib import Path

FULL = 2**20  # bytes free, below which a disk is said to be full


def why(notebook: Path) -> str:
    """Of a run whose notebook lies there, whole or not."""
    errors = Path(f"{notebook}.err")
    said = errors.read_text(errors="replace").strip().splitlines() if errors.is_file() else []
    found = failure(notebook) or (said[-1].strip() if said else "")
    folder = next(parent for parent in notebook.absolute().parents if parent.is_dir())
    if "No space left on device" in found or shutil.disk_usage(folder).free < FULL:
        return f"No space left on device in {notebook.parent}: make room and call again"
    if "DeadKernelError" in found or "Kernel died" in found:
        return "its process was killed, for want of memory perhaps (dmesg tells): call again, and it goes on from its checkpoint"
    if not found or found.startswith("Executing notebook"):  # papermill's own line before the first cell
        return "it ended without a word, killed perhaps: call again, and it goes on from its checkpoint"
    return found


def failure(notebook: Path) -> str | None:
    """The last line of the error in an executed notebook; None if it has none."""
    try:
        cells = json.loads(Path(notebook).read_text())["cells"]
    except (OSError, ValueError):
        return None
    errors = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    if not errors:
        return None
    name, value = errors[-1]["ename"], errors[-1]["evalue"]
    if name in ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError") or re.search("can't allocate memory|OutOfMemory", value):
        said = value.splitlines()[0] if value else name
        return f"out of memory ({said}): a smaller batch_size or image_size, or fewer runs at once"
    return value if name == "KdfastError" else f"{name}: {value}"


if __name__ == "__main__":  # python -m kdfast.study.failures NOTEBOOK
    log = Path(sys.argv[1])
    print(f"{log.parent.name} failed: {why(log)}", file=sys.stderr)
