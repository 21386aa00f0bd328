"""Reading a program of ``torch.export`` without running what a file may carry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from .errors import CommandError

__all__ = ["load_program"]


def load_program(path: Path) -> Any:
    """Return the ``torch.export.ExportedProgram`` of a ``.pt2`` file, with example inputs.

    ``torch.export.load`` would unpickle inputs, weights and constants that are no plain tensors, which can run code:
    here PyTorch is held to tensors (``TORCH_FORCE_WEIGHTS_ONLY_LOAD``) while it reads.

    Raises:
        CommandError: the file is damaged, holds other objects than tensors, or no example inputs.
    """
    import torch

    try:
        with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            program = torch.export.load(path)
    except Exception as error:  # of zip, JSON and schema readers
        raise CommandError(
            f"{path} cannot be read as a program of torch.export that holds tensors only: {error}. Write it with "
            "torch.export.save(torch.export.export(model, args, kwargs), path)."
        ) from error
    if program.example_inputs is None:
        raise CommandError(f"{path} holds no example inputs; export it with torch.export.export, which keeps them")
    return program
