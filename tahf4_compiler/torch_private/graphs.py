"""Graphs of ``torch.fx``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

__all__ = ["AUTOCAST", "Interpreter", "import_lines"]

AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
"""What stands in a graph where autocast begins and ends; the end takes the node of the begin."""


class Interpreter(fx.Interpreter):
    """Runs a graph, also while it is traced, with autocast on where the graph switches it on.

    PyTorch's own functions only write themselves into the trace. The types of what follows would be those without
    autocast.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        if target is AUTOCAST[0]:
            mode = torch.autocast(*args, **kwargs)
            mode.__enter__()
            return mode
        if target is AUTOCAST[1]:
            return args[0].__exit__(None, None, None)
        return super().call_function(target, args, kwargs)


def import_lines(values: Mapping[str, Any]) -> list[str]:
    """Return statements that import what the code of a graph reads beside its inputs (``python_code().globals``)."""
    return _format_import_block(dict(values), sys_importer).splitlines() if values else []
