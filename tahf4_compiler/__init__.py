"""tahf4: a graph compiler that runs PyTorch models in HiFloat4 W4A4 (4-bit weights, 4-bit activations).

Wrap a model with ``torch.compile(model, backend="tahf4")``, or capture and lower it step by step with
:func:`capture` and :func:`lower`. Passes are added with :func:`register_pass`.
"""

from . import ops, rewriting
from .calibration.calibration import Calibration, calibrate
from .calibration.from_weights import recipe_from_weights
from .debugging.bisect import Bisection, bisect
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
from .format import hif4
from .graph_capture.captured import Capture
from .graph_capture.export import capture
from .import_hook import when_imported
from .lowering import Lowered, lower
from .model.attachments import keep
from .ops.registry import Kernel, register_kernel
from .options import Options
from .packed import fusing
from .packed.config import TaHF4Config
from .packed.convert import dequantize_, quantize_, set_activation_bits
from .packed.guards import guard
from .packed.linear import HiF4Linear
from .packed.plan import plan_modules
from .packed.steps import set_high_precision_steps
from .pipeline.base import Pass, PassResult, register_pass, unregister_pass
from .pipeline.context import Context, Decision
from .pipeline.matching import Match, find_pattern, replace_pattern
from .pipeline.order import default_passes
from .recipe.apply import apply_recipe
from .recipe.recipe import Recipe
from .weights.formats import register_weight_format

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
    "recipe_from_weights",
    "register_kernel",
    "register_pass",
    "register_weight_format",
    "replace_pattern",
    "rewriting",
    "set_activation_bits",
    "set_high_precision_steps",
    "unregister_pass",
]


def _join_diffusers() -> None:
    from .diffusers_integration.quantizer import register

    register()


def _before_attention() -> None:
    import diffusers.utils.constants as constants

    if constants.DIFFUSERS_ATTN_BACKEND.startswith("tahf4"):  # diffusers looks it up before it can know of it
        constants.DIFFUSERS_ATTN_BACKEND = "native"


def _join_attention() -> None:
    from .diffusers_integration.attention import register

    register()


def _join_transformers() -> None:
    from .transformers_integration.quantizer import register

    register()


guard()
fusing.register()
when_imported("diffusers.quantizers.auto", _join_diffusers)
when_imported("diffusers.utils.constants", _before_attention)
when_imported("diffusers.models.attention_dispatch", _join_attention)
when_imported("transformers.quantizers.auto", _join_transformers)
