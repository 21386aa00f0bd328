"""Pack the linears of a model, and unpack them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import PackedError
from ..format import hif4
from ..model.attachments import attached_recipe, leave_as_they_are
from ..model.components import experts
from ..pipeline.context import Decision
from ..recipe.apply import recipe_experts
from ..recipe.recipe import Recipe
from ..weights.packing import warn_not_finite
from .linear import HiF4Linear
from .plan import plan_modules
from .readers import plan_transforms
from .transform import Transform

__all__ = ["PackingObserver", "dequantize_", "observers", "packed_linears", "quantize_"]


class PackingObserver(Protocol):
    """Is told of every model that was packed or unpacked, so that its library can save it as what it is."""

    def packed(self, model: nn.Module, recipe: Recipe | None, keep: Sequence[str]) -> None:
        """See a model some linears of which are packed now."""

    def unpacked(self, model: nn.Module) -> None:
        """See a model whose linears are plain again."""


observers: list[PackingObserver] = []


def quantize_(
    model: Any,
    recipe: Recipe | None = None,
    *,
    keep: Sequence[str] = (),
    expert: str | None = None,
    check_weights: bool = True,
) -> list[Decision]:
    """Replace every linear that the plan puts in HiF4 by a :class:`HiF4Linear`, and free its weight.

    One linear is converted after the other, so that memory does not grow beyond the model and one layer. Linears that
    are packed already stay as they are. The others carry their reason, so that compiling the model leaves them, too.
    Weights with NaN or infinities are packed as NaN, with a warning.

    Args:
        model: a module, or a pipeline whose denoisers are packed. It is changed in place.
        recipe: see :class:`tahf4_compiler.Recipe`. Without one, what :func:`tahf4_compiler.apply_recipe` attached
            holds; linears without either are rotated in Hadamard blocks of 64.
        keep: regular expressions, searched in module paths: linears that stay in high precision.
        expert: which expert's part of the recipe goes to a module.
        check_weights: as for :func:`tahf4_compiler.apply_recipe`.

    Returns:
        The plan, one decision for each linear; paths in a pipeline begin with the component's name.

    Raises:
        PatternError: a pattern of ``keep`` is no regular expression or matches no linear.
        RecipeError: the recipe does not fit the model.
        PackedError: the recipe has steps in high precision, the model is offloaded, or ``keep`` names a linear that is
            packed already. Nothing is changed then.
        OptionError: the model is neither module nor pipeline.
    """
    models = _unwrapped(model)
    named = set(models)
    if recipe is not None:
        if recipe.high_precision_steps:
            raise PackedError(
                f"the recipe runs the steps {list(recipe.high_precision_steps)} in high precision, which needs the "
                "original weights; a packed model has none. Use tahf4.apply_recipe with torch.compile, or a recipe "
                "without such steps."
            )
        named = set(recipe_experts(model, models, recipe, expert))
    work = []
    for name, module in models.items():
        mine, part = (recipe, expert if name == "" else name) if name in named else (None, None)
        plan = plan_modules(module, mine, keep, expert=part, check_weights=check_weights)
        work.append((name, module, plan, plan_transforms(module, plan, mine, expert=part)))
        _check_ready(module, work[-1][-1])
    todo = sum(d.k * d.n for _, _, plan, transforms in work for d in plan if d.module in transforms)
    decisions: list[Decision] = []
    with torch.no_grad(), tqdm(total=todo, desc="HiF4 weights", unit="value", unit_scale=True, delay=1.0) as bar:
        for name, module, plan, transforms in work:
            warn_not_finite(pack_modules(module, transforms, bar.update), name)
            leave_as_they_are(module, {d.module: d.reason for d in plan if d.decision != "hif4"})
            if packed_linears(module):
                for observer in observers:
                    observer.packed(module, recipe, keep)
            decisions += [replace(d, module=f"{name}.{d.module}" if name else d.module) for d in plan]
    return decisions


def pack_modules(
    model: nn.Module, transforms: dict[str, Transform], done: Callable[[int], Any] = lambda values: None
) -> list[str]:
    """Replace linears by packed ones.

    Args:
        model: changed in place.
        transforms: by module path, see :func:`tahf4_compiler.packed.readers.plan_transforms`.
        done: is told how many values were converted.

    Returns:
        The paths whose weights are not finite.
    """
    places, flags = _places(model), {}
    for path, transform in transforms.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        multiplier = transform.multiplier(linear.in_features)
        packed = transform.pack(linear.weight)
        if packed.scales.device.type != "meta":
            flags[path] = hif4.has_nan(packed.scales)
        new = HiF4Linear.from_linear(
            linear, packed, multiplier, transform.hadamard_block, transform.activation
        )
        for parent, name in places[id(linear)]:
            setattr(parent, name, new)
        done(linear.in_features * linear.out_features)
    return [path for path, flag in flags.items() if flag]  # read at the end: each is a wait for the device


def dequantize_(model: Any) -> list[str]:
    """Replace every packed linear by an ``nn.Linear`` with the dequantized weight.

    Args:
        model: a module or a pipeline, changed in place. One that is not packed stays as it is.

    Returns:
        The module paths that were packed.

    Raises:
        PackedError: the model is offloaded, or its layers are cast at each call. Nothing is changed then.
        OptionError: the model is neither module nor pipeline.
    """
    found = []
    models = _unwrapped(model)
    for module in models.values():
        for path, linear in packed_linears(module).items():
            _check_not_hooked(path, linear, "Take the hooks off first, or load the model again.")
    for component, module in models.items():
        places = _places(module)
        with torch.no_grad():
            for path in list(packed_linears(module)):
                packed = module.get_submodule(path)
                assert isinstance(packed, HiF4Linear)
                plain = packed.to_linear()
                for parent, name in places[id(packed)]:
                    setattr(parent, name, plain)
                found.append(f"{component}.{path}" if component else path)
        leave_as_they_are(module, {})
        for observer in observers:
            observer.unpacked(module)
    return found


def packed_linears(model: nn.Module) -> dict[str, HiF4Linear]:
    """Return the packed linears of a model by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, HiF4Linear)}


def _unwrapped(model: Any) -> dict[str, nn.Module]:
    """Return a model's denoisers by name, without what ``torch.compile`` put around them."""
    return {name: getattr(module, "_orig_mod", module) for name, module in experts(model).items()}


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return where each linear hangs: one that has two names, in one parent or two, is replaced in both."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() tells one name of a linear that has two
            if isinstance(child, nn.Linear):
                found[id(child)].append((parent, name))
    return found


def _check_ready(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise :class:`PackedError` if linears of a model cannot be replaced now."""
    for path in paths:
        if not path:
            raise PackedError("got a single nn.Linear, which cannot be replaced; pass the module that holds it")
        linear = model.get_submodule(path)
        _check_not_hooked(path, linear, "Pack the model first and enable offloading afterwards.")
        recipe = attached_recipe(linear.weight)
        if recipe is not None and recipe.steps is not None:
            raise PackedError(
                f"the recipe attached to {path} runs some steps in high precision, which needs the original weights; "
                "a packed model has none. Take it off with tahf4.apply_recipe(model, None) first."
            )


def _check_not_hooked(path: str, linear: nn.Module, advice: str) -> None:
    """Raise :class:`PackedError` for a linear whose ``forward`` is replaced: the hook would go on calling the old one.

    accelerate leaves a linear's own ``forward`` as an attribute where it takes a hook off.
    """
    forward = linear.__dict__.get("forward")
    own = getattr(forward, "__self__", None) is linear and forward.__func__ is type(linear).forward
    if forward is not None and not own:
        raise PackedError(f"{path} is hooked (its forward is replaced, as offloading does). {advice}")
