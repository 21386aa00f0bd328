"""tahf4: a graph compiler that runs PyTorch models in HiFloat4 W4A4 (4-bit weights, 4-bit activations).

Wrap a model with ``torch.compile(model, backend="tahf4")``, or capture and lower it step by step with
:func:`capture` and :func:`lower`. Passes are added with :func:`register_pass`.
"""

from . import hif4, ops
from .attach import keep
from .bisection import Bisection, bisect
from .calibration import Calibration, calibrate
from .errors import (
    CalibrationError,
    CaptureError,
    CheckpointError,
    FormatError,
    GradientError,
    OptionError,
    PackedError,
    PassError,
    PatternError,
    PipelineError,
    RecipeError,
    ShardingError,
    Tahf4Error,
)
from .graph_capture import Capture, capture
from .kernels import Kernel, register_kernel
from .lowering import Lowered, lower
from .module_plan import plan_modules
from .options import Options
from .packed.convert import dequantize_, quantize_
from .packed.linear import HiF4Linear
from .packed.register import register_when_imported
from .pass_base import Context, Decision, Pass, PassResult, register_pass, unregister_pass
from .patterns import Match, find_pattern, replace_pattern
from .pipeline import default_passes
from .recipe import Recipe, apply_recipe
from .weight_formats import register_weight_format

__version__ = "0.1.0"

__all__ = [
    "Bisection",
    "Calibration",
    "CalibrationError",
    "Capture",
    "CaptureError",
    "CheckpointError",
    "Context",
    "Decision",
    "FormatError",
    "GradientError",
    "HiF4Linear",
    "Kernel",
    "Lowered",
    "Match",
    "OptionError",
    "Options",
    "PackedError",
    "Pass",
    "PassError",
    "PassResult",
    "PatternError",
    "PipelineError",
    "Recipe",
    "RecipeError",
    "ShardingError",
    "TaHF4Config",
    "Tahf4Error",
    "apply_recipe",
    "bisect",
    "calibrate",
    "capture",
    "default_passes",
    "dequantize_",
    "find_pattern",
    "hif4",
    "keep",
    "lower",
    "ops",
    "plan_modules",
    "quantize_",
    "register_kernel",
    "register_pass",
    "register_weight_format",
    "replace_pattern",
    "unregister_pass",
]


def __getattr__(name: str) -> object:
    """Import what needs diffusers when it is asked for."""
    if name == "TaHF4Config":
        from .packed.config import TaHF4Config

        return TaHF4Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_imported()
