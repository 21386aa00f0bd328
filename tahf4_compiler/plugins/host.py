"""Functions outside of graphs for which a backend may bring a faster one, bit for bit the reference.

The reference lies beside its caller, which asks here first::

    fast = host.find("checksum", data)
    return fast(data, factors) if fast is not None else ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..errors import PipelineError
from . import entry_points

__all__ = ["find", "load_backends", "register"]

_functions: list[tuple[str, Callable[..., bool], Callable[..., Any]]] = []
_lock = threading.RLock()
_loaded = _loading = False


def register(name: str, serves: Callable[..., bool], function: Callable[..., Any]) -> None:
    """Add a function; the one registered last is asked first.

    Args:
        name: of what it does, as callers ask for it.
        serves: says whether it can take what :func:`find` is given.
        function: that does it.
    """
    _functions.insert(0, (name, serves, function))


def find(name: str, *given: Any) -> Callable[..., Any] | None:
    """Return the first function of a name that serves what is given; None where the reference must do."""
    load_backends()
    return next((function for known, serves, function in _functions if known == name and serves(*given)), None)


def load_backends() -> None:
    """Let the backends that are installed register what they bring, once.

    Raises:
        PipelineError: one of them cannot be imported, or fails. Every later call raises it again.
    """
    global _loaded, _loading
    if _loaded:
        return
    with _lock:  # another thread waits until all have registered; the backends themselves call this as well
        if _loaded or _loading:
            return
        _loading = True
        try:
            for name, join in entry_points.load(entry_points.KERNELS).items():
                _join(name, join)
            _loaded = True
        finally:
            _loading = False


def _join(name: str, join: Callable[[], Any]) -> None:
    try:
        join()
    except Exception as error:
        raise PipelineError(
            f"the plug-in {name!r} of {entry_points.KERNELS!r} failed to register its kernels: "
            f"{type(error).__name__}: {error}. Mend it or uninstall it."
        ) from error
