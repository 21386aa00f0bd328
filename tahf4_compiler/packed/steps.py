"""Denoising steps in which the linears of a packed model have activations of more bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import OptionError, PackedError
from ..model.attachments import Attachment, attach, attached_recipe, refresh
from ..model.components import unwrapped_experts
from ..model.reasons import Cause, Reason
from ..model.steps import StepPrecision
from ..options import check_protecting_bits
from .linear import HiF4Linear

__all__ = ["attach_steps", "set_high_precision_steps", "steps_of"]


def set_high_precision_steps(
    model: Any, steps: Sequence[int] | None = None, *, bits: int | None = None, scheduler: Any = None
) -> None:
    """Give the activations of a packed model more bits in some denoising steps.

    The packed weights stay as they are: nothing is copied. A model that ``torch.compile(backend="tahf4")`` compiled, or
    compiles later, has a second lowering for these steps and switches between the two. Where another compiler runs a
    packed linear, or ``torch.export`` traced it, its call raises :class:`PackedError`.

    Args:
        model: a packed pipeline, whose scheduler is counted, or a packed module.
        steps: their indices, negative ones from the end; an empty list takes them off. A generation that does not have
            one brings a warning. None: those that the model has, from its recipe or from the folder that it was loaded
            from.
        bits: 8, or 16 (not quantized, the nearest to the original precision). None: what the model has, else 16.
        scheduler: of a bare module.

    Raises:
        PackedError: nothing is packed; or ``steps`` is None, and the model has none.
        OptionError: ``steps`` or ``bits`` are none of these, nothing counts the steps, or the model is neither module
            nor pipeline.
    """
    listed = isinstance(steps, Sequence) and not isinstance(steps, str | bytes)
    if steps is not None and (not listed or any(type(step) is not int for step in steps)):
        raise OptionError(f"steps is {steps!r}; expected a list of step indices")
    check_protecting_bits("bits", bits)
    clock = scheduler if scheduler is not None else model if getattr(model, "scheduler", None) is not None else None
    if (scheduler is not None and not callable(getattr(scheduler, "step", None))) or isinstance(scheduler, type):
        raise OptionError(f"scheduler is {scheduler!r}; expected a scheduler of diffusers")
    if clock is None and (steps is None or steps):
        raise OptionError(f"{type(model).__name__} has no scheduler, which counts the steps; pass scheduler=...")
    found = {name: module for name, module in unwrapped_experts(model).items() if _packed(module)}
    if not found:
        raise PackedError(
            f"{type(model).__name__} holds no packed linear; call tahf4.quantize_(model) first, or give the original "
            "a recipe with high_precision_steps"
        )
    known = {name: steps_of(module) for name, module in found.items()}
    if steps is None and not any(known.values()):
        raise PackedError(
            f"{type(model).__name__} has no steps in high precision: neither a recipe nor its folder named any; "
            "pass steps=[...]"
        )
    for name, module in found.items():
        old = known[name]
        wanted = steps if steps is not None else old.steps if old is not None else ()
        of_old = old.bits if old is not None else None
        attach_steps(module, StepPrecision(clock, wanted, bits or of_old) if wanted else None)


def attach_steps(model: nn.Module, steps: StepPrecision | None) -> None:
    """Let steps decide on the bits of the activations of a module's packed linears; None: no steps."""
    for linear in _packed(model):
        said = {}
        if steps is not None:
            bits = steps.bits or 16
            reason = Reason(Cause.PACKED, f"packed; activations of {bits} bits in the steps {list(steps.steps)}")
            said = {"weight_codes": Attachment("hif4", reason, steps=steps)}
        attach(linear, said)


def steps_of(model: nn.Module) -> StepPrecision | None:
    """Return what :func:`attach_steps` attached to a module's packed linears, or None."""
    refresh(model)  # a copy has other parameters than those that something was attached to
    found = (attached_recipe(linear.weight_codes) for linear in _packed(model))
    return next((said.steps for said in found if said is not None and said.steps is not None), None)


def _packed(model: nn.Module) -> list[HiF4Linear]:
    return [module for module in model.modules() if isinstance(module, HiF4Linear)]
