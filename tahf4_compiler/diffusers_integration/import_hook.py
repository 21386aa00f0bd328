"""Make diffusers know ``quant_method: "tahf4"``, without importing it before somebody else does."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["register_when_imported"]

AUTO = "diffusers.quantizers.auto"


def register_when_imported() -> None:
    """Add the quantizer to diffusers' tables, now or as soon as diffusers has them."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(AUTO, _register))


def _register() -> None:
    for name, last in (("config", "TaHF4Config"), ("quantizer", "register")):
        module = sys.modules.get(f"{__package__}.{name}")
        if module is not None and not hasattr(module, last):
            return  # it is being imported, and registers at its end
    from .quantizer import register

    register()


class _Finder(importlib.abc.MetaPathFinder):
    """Find one module as usual and do something once it has run; importing diffusers takes seconds."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.then()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
