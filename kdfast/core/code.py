"""Which code made a run: a hash of everything that it imports, by syntax and wherever it stands; and the plug-ins it uses.

A module's digest is that of its syntax tree without docstrings, in which every import from kdfast is replaced by the digest of
the imported module. So comments, formatting and the place of a module do not count, a change below counts, and what a run does
not import (analysis, the workflow, other methods) leaves its records as valid as they were.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from kdfast.core.config import Run
from kdfast.core.provenance import NOTEBOOK, PACKAGE, plugins

RUN = ("kdfast.experiment.runner",)  # what a run's notebook calls; it imports the rest but for the methods, which go by name
METHODS = PACKAGE / "distill" / "methods"


def code_hash(
    method: str = "",  # of the run, `dkd+at` for a sum; "" and baseline: none
    models: Iterable[str] = (),  # names of student and teacher, by which plug-ins are found
    roots: Iterable[str] = RUN,  # modules to begin with
    notebook: Path | None = NOTEBOOK,  # its code cells count too
) -> str:
    """12 hex digits over the notebook's code cells, what the roots import, and the files of the run's method and models."""
    digests = [_module(name) for name in roots]
    digests += [_file(path) for path in method_files(method)]
    digests += [_file(path) for path in used_plugins(method, models)]
    cells = json.loads(notebook.read_text())["cells"] if notebook is not None and notebook.is_file() else []
    digests += [_cell("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\n".join(dict.fromkeys(digests)).encode()).hexdigest()[:12]


def code_of(run: Run) -> str:
    """Of a run: what it imports, its method and its networks."""
    return code_hash(*uses(run))


# What a run uses by name


def uses(run: Run) -> tuple[str, tuple[str, ...]]:
    """Its method, and the names of its networks."""
    return run.method, (run.student, *([run.teacher.split(".")[0]] if run.teacher else []))


def method_files(method: str) -> list[Path]:
    """kdfast's own files in which the methods of that name are registered."""
    names = set(method.split("+"))
    return [path for path in sorted(METHODS.glob("*.py")) if names & _registered(path, _changed(path))]


def used_plugins(method: str = "", models: Iterable[str] = ()) -> list[Path]:
    """The files of `plugins/` that register a method or model of the run, or something under a name that is made up when run."""
    names = {*method.split("+"), *models, ""}
    return [path for path in plugins() if names & _registered(path, _changed(path))]


def plugin_digests(method: str = "", models: Iterable[str] = ()) -> dict[str, str]:
    """16 hex digits of the SHA-256 of each plug-in that a run uses, by its file's name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in used_plugins(method, models)}


def plugin_packages(method: str = "", models: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the installed packages that those plug-ins import."""
    found: set[str] = set()
    for path in used_plugins(method, models):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    known = packages_distributions() if found - sys.stdlib_module_names - {"kdfast", ""} else {}
    versions = {}
    for distribution in sorted({d for name in found - {"kdfast"} for d in known.get(name, ())}):
        try:
            versions[distribution.lower()] = version(distribution)
        except PackageNotFoundError:
            continue
    return versions


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


@cache
def _registered(path: Path, changed: int) -> frozenset[str]:
    """Names given to `register` and `register_model` in a file; "" stands for one that is no literal."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and _called(node.func) in ("register", "register_model"):
            given = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "name"), None)
            found.add(given.value if isinstance(given, ast.Constant) else "")
    return frozenset(found)


def _called(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""


# Digests


def _module(name: str) -> str:
    return _file(_path(name) or PACKAGE / "__init__.py")


def _path(name: str) -> Path | None:
    """The file of a module of kdfast; None if there is no such module."""
    place = PACKAGE.joinpath(*name.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _file(path: Path) -> str:
    return _digest(path, _changed(path), tuple((p, _changed(p)) for p in _below(path)))


@cache
def _digest(path: Path, changed: int, below: tuple) -> str:
    """Of a module as it was at that time, and what it imports; a run asks for several hashes of the same files."""
    tree = _Plain().visit(ast.parse(path.read_bytes()))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _below(path: Path) -> list[Path]:
    """All modules of kdfast that a file imports, directly or not."""
    found: dict[Path, None] = {}
    ahead = [path]
    while ahead:
        for other in _imports(ahead[0], _changed(ahead.pop(0))):
            if other not in found and other != path:
                found[other] = None
                ahead.append(other)
    return list(found)


@cache
def _imports(path: Path, changed: int) -> tuple[Path, ...]:
    nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return tuple(dict.fromkeys(p for node in nodes for p in _targets(node)))


def _targets(node: ast.Import | ast.ImportFrom) -> list[Path]:
    """The files of kdfast that an import names: of each name the module, or the module that it is taken from."""
    if isinstance(node, ast.Import):
        paths = [_path(alias.name) for alias in node.names if alias.name.partition(".")[0] == "kdfast"]
    elif node.module and node.module.partition(".")[0] == "kdfast":
        paths = [_path(f"{node.module}.{alias.name}") or _path(node.module) for alias in node.names]
    else:
        paths = []
    return [path for path in dict.fromkeys(paths) if path is not None]


class _Plain(ast.NodeTransformer):
    """Takes docstrings away, and from imports of kdfast's modules their place."""

    def visit_Module(self, node):
        return self._without_docstring(node)

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = visit_Module

    def _without_docstring(self, node):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_Import(self, node):
        return self._by_content(node)

    visit_ImportFrom = visit_Import

    def _by_content(self, node):
        targets = _targets(node)
        if not targets:
            return node
        names = sorted(f"{alias.name.rpartition('.')[2]} {alias.asname or ''}" for alias in node.names)
        return ast.Expr(ast.Constant([*sorted(_file(path) for path in targets), *names]))


def _cell(source: str) -> str:
    """Of a notebook's cell, without comments where it is plain Python."""
    try:
        source = ast.dump(ast.parse(source))
    except SyntaxError:
        source = re.sub(r"(?m)^\s*#.*$", "", source)
    return hashlib.sha256(source.encode()).hexdigest()
