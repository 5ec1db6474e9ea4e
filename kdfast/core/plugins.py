"""A user's own methods and models: the files of the folder `plugins/`, imported when a name is asked for."""

import hashlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader

from kdfast.core import provenance
from kdfast.core.errors import KdfastError

_LOADED: dict[str, str] = {}  # plugin file -> digest of what was loaded


class _AsItIs(SourceFileLoader):
    """Without bytecode, which takes a file that changed within a second to the same length for unchanged."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


def load_plugins() -> None:
    """Import the methods and models of `plugins/*.py`, each file again when it has changed."""
    for path in provenance.plugins():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if _LOADED.get(str(path)) == digest:
            continue
        name = f"kdfast_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path, loader=_AsItIs(name, str(path)))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except KdfastError:
            raise
        except Exception as error:
            raise KdfastError(f"plugin {path} does not load ({type(error).__name__}: {error}): mend it or remove it") from error
        _LOADED[str(path)] = digest
