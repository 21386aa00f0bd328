"""The passes that ship here, one a file, and the pipelines that they make."""

from .attention import Attention
from .attention_prologue import AttentionPrologue
from .classify import Classify
from .fuse import Fuse
from .lower import Lower
from .normalize import Normalize
from .observe import Observe
from .observe_attention import ObserveAttention
from .plan import Plan
from .quantize import Quantize
from .rotate import Rotate
from .scale_search import ScaleSearch
from .share import Share
from .smooth import Smooth
from .span import Span
from .upcast import Upcast

__all__ = ["CALIBRATION", "DEFAULT"]

DEFAULT = (
    Normalize,  # one spelling for each meaning: linears whole, no-ops gone
    Classify,  # repeated block or boundary, by structure
    Plan,  # a decision and its reason for every linear
    Quantize,  # linear -> quantize + W4A4 linear
    Share,  # one quantization for q, k and v; one merged product
    Smooth,  # channel masks of a recipe
    Rotate,  # block Hadamard with random signs
    ScaleSearch,  # scales of weights by squared error
    Span,  # one level-1 scale for several units, if asked for
    Attention,  # scaled dot product attention in 8 bits, if asked for
    AttentionPrologue,  # norms and rotary embeddings of queries and keys into attention in 8 bits
    Upcast,  # float32 between 16-bit inputs and outputs, if asked for
    Fuse,  # norms and activations into quantizations, gates and residuals into products
    Lower,  # choose a kernel for each operator
)
"""What compiles a model: one language, decisions, the rewrite, transforms, kernels."""

CALIBRATION = (Normalize, Classify, Plan, Observe, ObserveAttention)
"""What shows a model's activations, and its attentions, to a calibration, in place of the rewrite."""
