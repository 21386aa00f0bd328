"""What reads the state of a packed model: whether it says so in what it writes, or looks at shapes alone."""

from __future__ import annotations

from torch import nn

from ..errors import PackedError
from ..torch_private.frames import Caller, callers

__all__ = ["check_saver", "compares_shapes"]


def check_saver(path: str) -> None:
    """Refuse ``save_pretrained`` of a module whose configuration does not list a packed linear.

    And what makes a ControlNet of a packed model: it loads the state with ``strict=False``.

    Every library's ``save_pretrained`` writes a configuration and a state dict. The tensors alone do not make a packed
    model again: ``from_pretrained`` would leave them out, and leave weights random. Who saves is where Python keeps it,
    on the stack; a state dict that nobody's ``save_pretrained`` asks for is never refused.

    Args:
        path: of the packed linear, in the module whose state is written down.

    Raises:
        PackedError: the configuration does not list it, or another model is made of the state.
    """
    caller = next((c for c in callers() if c.name == "save_pretrained" or _makes_another(c)), None)
    if caller is not None and _makes_another(caller):
        raise PackedError(
            f"{caller.name} would take {path}, which is packed, into a model of plain linears, and diffusers "
            "would leave their weights random. Make the new model of the original, and pack both."
        )
    saver = caller.variable("self") if caller is not None else None
    if not isinstance(saver, nn.Module) or _saves_adapters_alone(saver):
        return
    config = getattr(getattr(saver, "hf_quantizer", None), "quantization_config", None)
    if path in getattr(config, "linears", ()):
        return
    raise PackedError(
        f"{type(saver).__name__}.save_pretrained would save {path}, which is packed, and nothing that says so: "
        "from_pretrained would load random weights in its place. Models of diffusers and transformers can be saved if "
        "tahf4.quantize_ got the model that is saved, and not a part of it: call it again with the whole model and "
        "keep=[...] for what stays as it is. Any other model: save its state_dict(), pack a new model in the same way, "
        "and load the state into it."
    )


def compares_shapes() -> bool:
    """Whether diffusers asks for a state dict to compare the weights' shapes with those of a LoRA, as Flux does."""
    return any(c.name == "_maybe_expand_lora_state_dict" and c.library == "diffusers" for c in callers())


def _makes_another(caller: Caller) -> bool:
    """Whether diffusers makes a ControlNet of a model."""
    return caller.name in ("from_transformer", "from_unet") and caller.library == "diffusers"


def _saves_adapters_alone(saver: nn.Module) -> bool:
    """Whether a ``save_pretrained`` leaves linears out: that of peft, and of transformers with an adapter loaded."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(saver).__mro__}
    return "peft" in libraries or ("transformers" in libraries and getattr(saver, "_hf_peft_config_loaded", False))
