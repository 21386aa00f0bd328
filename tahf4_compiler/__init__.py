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
    FormatError,
    GradientError,
    OptionError,
    PassError,
    PatternError,
    PipelineError,
    RecipeError,
    Tahf4Error,
)
from .graph_capture import Capture, capture
from .kernels import Kernel, register_kernel
from .lowering import Lowered, lower
from .options import Options
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
    "Context",
    "Decision",
    "FormatError",
    "GradientError",
    "Kernel",
    "Lowered",
    "Match",
    "OptionError",
    "Options",
    "Pass",
    "PassError",
    "PassResult",
    "PatternError",
    "PipelineError",
    "Recipe",
    "RecipeError",
    "Tahf4Error",
    "apply_recipe",
    "bisect",
    "calibrate",
    "capture",
    "default_passes",
    "find_pattern",
    "hif4",
    "keep",
    "lower",
    "ops",
    "register_kernel",
    "register_pass",
    "register_weight_format",
    "replace_pattern",
    "unregister_pass",
]
