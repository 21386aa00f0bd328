"""Generated kernel files: written once under the hash of their text, imported from there.

Each file holds the functions it needs and depends on Triton alone. Files lie in ``TAHF4_KERNEL_DIR``, or beside
Inductor's cache; a dump of a compiled graph has copies of those that it uses.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ...files.replacing import replacing
from ...torch_private.inductor import cache_folder

__all__ = ["functions_text", "kernel_folder", "load", "module_text"]

_lock = threading.Lock()
_FILES = ("functions.py", "attention_kernels.py")


def kernel_folder() -> Path:
    """Return where generated kernels are kept."""
    chosen = os.environ.get("TAHF4_KERNEL_DIR")
    if chosen:
        return Path(chosen)
    return cache_folder() / "tahf4_kernels"


@functools.cache
def _functions() -> dict[str, tuple[str, frozenset[str]]]:
    """Return name -> (text, names of the functions that it calls), in the order of the file."""
    text = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _FILES)
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    names = {node.name for node in nodes}
    found = {}
    for node in nodes:
        first = min(d.lineno for d in node.decorator_list)
        called = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in names} - {node.name}
        found[node.name] = "\n".join(lines[first - 1 : node.end_lineno]), frozenset(called)
    return found


def functions_text(names: Iterable[str]) -> str:
    """Return the text of functions of :mod:`.functions` or :mod:`.attention_kernels`, and of those that they call."""
    known = _functions()
    wanted, open_names = set(), set(names)
    while open_names:
        name = open_names.pop()
        wanted.add(name)
        open_names |= known[name][1] - wanted
    return "\n\n\n".join(text for name, (text, _) in known.items() if name in wanted)


def module_text(what: str, functions: Iterable[str], kernels: str) -> str:
    """Return a whole file.

    Args:
        what: what its docstring says.
        functions: of :mod:`.functions` that it needs.
        kernels: text of its own functions.
    """
    parts = (f'"""{what}\n"""', "import triton\nimport triton.language as tl", functions_text(functions), kernels)
    return "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"


@functools.cache
def load(text: str) -> ModuleType:
    """Write a file under its hash, if it is not there yet, and import it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = kernel_folder()
    path = folder / f"k_{digest}.py"
    with _lock:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                beside.write_text(text, encoding="utf-8")
        name = f"tahf4_kernels.k_{digest}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module
