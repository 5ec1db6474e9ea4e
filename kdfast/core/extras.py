"""Packages that only some uses need: where one is missing, a sentence with the command that installs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from kdfast.core.errors import KdfastError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages of that extra in pyproject.toml: a KdfastError where one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(str(error.name), name) from None


def require(name: str, *packages: str) -> None:
    """The same for packages that another process will import."""
    for package in packages:
        if find_spec(package) is None:
            raise _missing(package, name)


def _missing(package: str, name: str) -> KdfastError:
    return KdfastError(f'{package.split(".")[0]} is not installed, which this needs: pip install "kdfast[{name}]"')
