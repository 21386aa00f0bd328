"""The errors that tahf4 raises.

Each message says what was found, what was expected and what to do. Every error derives from
:class:`Tahf4Error`, so one ``except`` clause catches all of them.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "FormatError",
    "GradientError",
    "OptionError",
    "PackedError",
    "PassError",
    "PatternError",
    "PipelineError",
    "RecipeError",
    "ShardingError",
    "Tahf4Error",
]


class Tahf4Error(Exception):
    """Base class of every error of this project."""


class FormatError(Tahf4Error, ValueError):
    """A tensor or packed value cannot be read or written as HiFloat4."""


class CaptureError(Tahf4Error, RuntimeError):
    """A model could not be captured as a graph of ATen operators."""


class GradientError(Tahf4Error, RuntimeError):
    """A graph needs gradients, which a 4-bit graph does not have."""


class OptionError(Tahf4Error, ValueError):
    """An option is unknown or has a value of the wrong type or range."""


class PatternError(OptionError):
    """A module path pattern is no regular expression, or matches no linear."""


class PipelineError(Tahf4Error, ValueError):
    """The passes of a pipeline cannot be put in an order, or are not what a pass must be."""


class PassError(Tahf4Error, RuntimeError):
    """A pass failed, or left a graph that breaks its contract. The message names the pass."""


class CalibrationError(Tahf4Error, RuntimeError):
    """A calibration saw nothing, was used in the wrong order, or its checkpoint does not fit."""


class RecipeError(Tahf4Error, ValueError):
    """A recipe cannot be read, or was made for other modules, shapes or weights."""


class ShardingError(Tahf4Error, ValueError):
    """A linear or a model cannot be divided among so many ranks."""


class PackedError(Tahf4Error, RuntimeError):
    """A packed model cannot do what was asked: its original weights are gone, or a checkpoint does not fit it."""


class CheckpointError(Tahf4Error, ValueError):
    """A checkpoint's files cannot be read, do not fit each other or their model, or cannot be written."""
