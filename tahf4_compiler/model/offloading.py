"""Who moves the parameters of a module away while it does not run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["around", "offloader"]


def offloader(model: nn.Module, path: str) -> str | None:
    """Return the path of what moves the parameters of a module to the device and away: itself, another, or None.

    In between its parameters may be anywhere, and hold anything.
    """
    for outer, module in around(model, path):
        hook = getattr(module, "_hf_hook", None)  # accelerate
        offloads = any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))
        registry = getattr(module, "_diffusers_hook", None)
        if offloads or (registry is not None and registry.get_hook("group_offloading") is not None):
            return outer
    return None


def around(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules around one, or around a parameter, and itself, with their paths."""
    outer, module = "", model
    yield outer, module
    for part in path.split("."):
        inner = getattr(module, part, None)
        if not isinstance(inner, nn.Module):
            return
        outer, module = f"{outer}.{part}".removeprefix("."), inner
        yield outer, module
