"""Pack the linears of a model, and unpack them again."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import PackedError
from ..format.spans import joined, parted, span_name
from ..model.attachments import attached_recipe, leave_as_they_are
from ..model.components import unwrapped_experts
from ..model.linears import linear_weights, plain_path, require_matches
from ..model.offloading import around, offloader
from ..model.steps import StepPrecision
from ..options import activation_bits, bits_for
from ..options import rounding as check_rounding
from ..options import scale_span as check_scale_span
from ..pipeline.context import Decision
from ..pipeline.rules import span_obstacle
from ..recipe.apply import recipe_attention, recipe_experts
from ..recipe.recipe import Recipe
from ..weights.flaws import Flaws
from .adapters import leave_what_adapters_read
from .attention import attach_attention, attention_of
from .linear import HiF4Linear
from .plan import left_out, plan_modules, plan_transforms, unfit_in_blocks, why_nothing
from .steps import attach_steps, steps_of
from .transform import Transform

__all__ = [
    "PackingObserver",
    "dequantize_",
    "observers",
    "packed_linears",
    "quantize_",
    "set_activation_bits",
]


class PackingObserver(Protocol):
    """Is told of every model that was packed or unpacked, so that its library can save it as what it is."""

    def packed(self, model: nn.Module, recipe: Recipe | None, keep: Sequence[str]) -> None:
        """See a model some linears of which are packed now."""

    def unpacked(self, model: nn.Module) -> None:
        """See a model whose linears are plain again."""


observers: list[PackingObserver] = []
log = logging.getLogger(__name__)


def quantize_(
    model: Any,
    recipe: Recipe | None = None,
    *,
    keep: Sequence[str] = (),
    expert: str | None = None,
    check_weights: bool = True,
    scale_span: int | str = 1,
    rounding: str = "half_away",
) -> list[Decision]:
    """Replace every linear that the plan puts in HiF4 by a :class:`HiF4Linear`, and free its weight.

    All linears are converted before the first is replaced, so that an error or an interrupt leaves the model as it was.
    Until then memory holds the packed weights beside the model. Linears that are packed already stay as they are. The
    others carry their reason, so that compiling the model leaves them, too. Weights with NaN or infinities are packed
    as NaN, with a warning; so are those beyond the range of HiF4, cut to it. A model in which nothing is packed is told
    of in a warning, too.

    Args:
        model: a module, or a pipeline whose denoisers are packed. It is changed in place.
        recipe: see :class:`tahf4_compiler.Recipe`. Without one, what :func:`tahf4_compiler.apply_recipe` attached
            holds; linears without either are rotated in Hadamard blocks of 64.
        keep: regular expressions, searched in module paths: linears that stay in high precision.
        expert: which expert's part of the recipe goes to a module.
        check_weights: as for :func:`tahf4_compiler.apply_recipe`.
        scale_span: how many units of a row share a level-1 scale, in activations and weights: 1, 2 or 4, or ``"row"``
            for all. A recipe's own span comes first.
        rounding: of elements, in activations and weights, see :class:`tahf4_compiler.Options`. A recipe's own comes
            first.

    Returns:
        The plan, one decision for each linear; paths in a pipeline begin with the component's name.

    Raises:
        PatternError: a pattern of ``keep`` is no regular expression or matches no linear.
        RecipeError: the recipe does not fit the model.
        PackedError: the model is offloaded, or ``keep`` names a linear that is packed already, or one is packed already
            with another span or rounding than what is asked for here, or an adapter is fused into a weight.
        OptionError: the model is neither module nor pipeline, or span or rounding is unknown.
    """
    span = joined(check_scale_span("scale_span", scale_span), check_rounding("rounding", rounding, scale_span))
    models = unwrapped_experts(model)
    named = set(models)
    given = None
    if recipe is not None:
        named = set(recipe_experts(model, models, recipe, expert))
        if recipe.high_precision_steps:
            clock = model if getattr(model, "scheduler", None) is not None else None
            given = StepPrecision(clock, recipe.high_precision_steps, recipe.step_activation_bits)
    work, steps, attention = [], {}, {}
    for name, module in models.items():
        mine, part = (recipe, expert if name == "" else name) if name in named else (None, None)
        plan = plan_modules(module, mine, keep, expert=part, check_weights=check_weights)
        _check_packed(module, span)
        leave_what_adapters_read(module, plan)
        work.append((name, module, plan, plan_transforms(module, plan, mine, expert=part, span=span)))
        _check_ready(module, work[-1][-1])
        # What is attached to the linears that stay is not for those that were packed before.
        coming = given if mine is not None else _steps_to_come(module) if work[-1][-1] else None
        steps[name] = coming or steps_of(module)
        said = recipe_attention(module, mine, expert=part) if mine is not None else {}
        attention[name] = {**attention_of(module), **said}
    todo = sum(d.k * d.n for _, _, plan, transforms in work for d in plan if d.module in transforms)
    with torch.no_grad(), tqdm(total=todo, desc="HiF4 weights", unit="value", unit_scale=True, delay=1.0) as bar:
        flaws = {name: Flaws() for name in models}
        made = {name: _packed(module, transforms, flaws[name], bar.update) for name, module, _, transforms in work}
    with contextlib.ExitStack() as stack:
        for name, module, _, _ in work:
            stack.enter_context(_replaced(module, made[name].values()))
        for name, module, _, _ in work:
            attach_attention(module, attention[name])
            flaws[name].warn(name)
            for observer in observers if packed_linears(module) else ():
                observer.packed(module, recipe, keep)
    decisions: list[Decision] = []
    for name, module, plan, _ in work:
        if steps[name] is not None:
            attach_steps(module, steps[name])
        leave_as_they_are(module, {d.module: d.reason for d in plan if d.decision != "hif4"})
        some = any(d.decision == "hif4" for d in plan)
        if not some:
            log.warning("%s: nothing runs in 4 bits: %s", name or type(module).__name__, why_nothing(module, plan))
        elif unfit := unfit_in_blocks(module, plan):
            log.warning(
                "%s: %d linears of its repeated blocks cannot be packed and stay in high precision (%s)",
                name or type(module).__name__,
                len(unfit),
                "; ".join(f"{count}: {reason}" for reason, count in Counter(map(str, unfit.values())).most_common(3)),
            )
        if text := left_out(module, matrices=some):
            log.warning("%s: %s", name or type(module).__name__, text)
        decisions += [replace(d, module=f"{name}.{d.module}" if name else d.module) for d in plan]
    return decisions


def _check_packed(model: nn.Module, form: int) -> None:
    """Raise :class:`PackedError` where a span or a rounding is wanted that linears lack which are packed already.

    The defaults are what is taken where nobody wants anything.
    """
    (span, rounding), (usual, half_away) = parted(form), parted(1)
    spans, roundings = [], []
    for path, linear in packed_linears(model).items():
        able = span_obstacle(linear.activation_bits, linear.multiplier is not None, linear.hadamard_block) is None
        if able and span not in (usual, linear.span):
            spans.append(path)
        if rounding not in (half_away, linear.rounding):
            roundings.append(path)
    for option, others in ((f"scale_span={span_name(span)!r}", spans), (f"rounding={rounding!r}", roundings)):
        if others:
            raise PackedError(
                f"{option} reaches no linear that is packed already, and {len(others)} are packed otherwise "
                f"({', '.join(others[:3])}). Give it when the model is packed first. tahf4.dequantize_(model) goes "
                "back to plain weights, with the error that they have now."
            )


def _steps_to_come(model: nn.Module) -> StepPrecision | None:
    """Return the steps of the recipe that was attached to a model's weights, which are about to be packed."""
    recipes = (attached_recipe(weight) for _, weight in linear_weights(model))
    return next((recipe.steps for recipe in recipes if recipe is not None and recipe.steps is not None), None)


def pack_modules(model: nn.Module, transforms: Mapping[str, Transform], flaws: Flaws) -> None:
    """Replace linears by packed ones, all or none.

    Args:
        model: changed in place.
        transforms: by module path, see :func:`tahf4_compiler.packed.plan.plan_transforms`.
        flaws: is shown the weights.
    """
    with _replaced(model, _packed(model, transforms, flaws).values()):
        pass


def _packed(
    model: nn.Module,
    transforms: Mapping[str, Transform],
    flaws: Flaws,
    done: Callable[[int], Any] = lambda values: None,
) -> dict[str, tuple[nn.Linear, HiF4Linear]]:
    """Return linears and their packed forms, by module path; ``done`` is told how many values were converted."""
    if transforms:
        _check_own_forward()
    found = {}
    for path, transform in transforms.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        multiplier = transform.multiplier(linear.in_features)
        packed = transform.pack(linear.weight)
        rest = transform.remainder(linear.weight)
        flaws.look(path, rest, packed, transform.mask, transform.seed, transform.hadamard_block)
        block, activation = transform.hadamard_block, transform.activation
        form = (multiplier, block, activation, transform.low_rank, transform.span)
        made = HiF4Linear.from_linear(linear, packed, *form)
        made.activation_bits = transform.activation_bits
        found[path] = linear, made
        done(linear.in_features * linear.out_features)
    return found


@contextlib.contextmanager
def _replaced(model: nn.Module, pairs: Iterable[tuple[nn.Linear, nn.Linear]]) -> Iterator[None]:
    """Put linears of a model in the places of others, and all of these back if that or what follows raises."""
    places = _places(model)
    done = []
    try:
        for old, new in pairs:
            for parent, name in places[id(old)]:
                setattr(parent, name, new)
                done.append((parent, name, old))
        yield
    except BaseException:
        for parent, name, old in done:
            setattr(parent, name, old)
        raise


def dequantize_(model: Any) -> list[str]:
    """Replace every packed linear by an ``nn.Linear`` with the dequantized weight.

    Args:
        model: a module or a pipeline, changed in place. One that is not packed stays as it is.

    Returns:
        The module paths that were packed.

    Raises:
        PackedError: the model is offloaded, or its layers are cast at each call, or the bias of a packed linear is
            computed. Nothing is changed then.
        OptionError: the model is neither module nor pipeline.
    """
    found = []
    models = unwrapped_experts(model)
    for module in models.values():
        for path, linear in packed_linears(module).items():
            _check_not_hooked(path, linear, "Take the hooks off first, or load the model again.")
            if "bias" not in linear._parameters:
                raise PackedError(
                    f"the bias of {path} is no parameter any more: pruning or a parametrization computes it. Take that "
                    "off first (torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)."
                )
    for component, module in models.items():
        linears = packed_linears(module)
        with torch.no_grad():
            made = [(packed, packed.to_linear()) for packed in linears.values()]
        with _replaced(module, made):
            for observer in observers:
                observer.unpacked(module)
        leave_as_they_are(module, {})
        found += [f"{component}.{path}" if component else path for path in linears]
    return found


def set_activation_bits(model: Any, bits: int | Mapping[str, int]) -> dict[str, int]:
    """Say how many bits the activations of a packed model's linears have.

    The packed weights stay as they are, so that nothing is lost or copied, and it may be said as often as wanted.
    ``torch.compile`` compiles a graph for each choice once.

    Args:
        model: a packed module, or a pipeline.
        bits: 4 (HiF4), 8 (int8 with a float32 scale for each unit of 64 values) or 16 (not quantized; the weight is
            dequantized in each call) for all linears, or a mapping of regular expressions, searched in module paths,
            to these: the first that matches counts. Linears that none matches keep what they have.

    Returns:
        The bits of every packed linear by module path; paths in a pipeline begin with the component's name.

    Raises:
        OptionError: another number of bits, or the model is neither module nor pipeline.
        PatternError: a pattern is no regular expression, or matches no packed linear.
        PackedError: nothing is packed.
    """
    given = activation_bits("bits", bits)
    models = unwrapped_experts(model)
    found = {
        f"{name}.{path}" if name else path: linear
        for name, module in models.items()
        for path, linear in packed_linears(module).items()
    }
    names: dict[int, list[str]] = defaultdict(list)  # a module may have several
    for name, module in models.items():
        for path, inner in module.named_modules(remove_duplicate=False):
            names[id(inner)].append(".".join(filter(None, (name, plain_path(path)))))
    if not found:
        raise PackedError(
            f"{type(model).__name__} holds no packed linear; call tahf4.quantize_(model) first, or compile the model "
            'with options={"activation_bits": ...}'
        )
    known = [path for linear in found.values() for path in names[id(linear)]]
    require_matches([pattern for pattern, _ in given], known, type(model).__name__, "activation_bits")
    for linear in found.values():
        linear.activation_bits = bits_for(names[id(linear)], given, linear.activation_bits)
    return {path: linear.activation_bits for path, linear in found.items()}


def packed_linears(model: nn.Module) -> dict[str, HiF4Linear]:
    """Return the packed linears of a model by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, HiF4Linear)}


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
        _check_around(model, path)


def _check_around(model: nn.Module, path: str) -> None:
    """Raise :class:`PackedError` for a linear whose weight a module around it moves away or will subtract from."""
    if (outer := offloader(model, path)) is not None:
        raise PackedError(
            f"{path} is offloaded by {outer or 'the whole model'}. Pack the model first and enable offloading "
            "afterwards."
        )
    for _, module in around(model, path):
        if merged := getattr(module, "merged_adapters", ()):  # peft
            raise PackedError(
                f"the weight of {path} has adapters fused into it ({', '.join(map(str, merged))}), and nothing takes "
                "them out of a packed one. Unfuse them first (unfuse_lora, unmerge_adapter): they run beside the 4-bit "
                "product. Or unload them (unload_lora_weights, merge_and_unload): then the fused weight is packed."
            )


def _check_own_forward() -> None:
    """Raise :class:`PackedError` if somebody replaced the ``forward`` of all linears: packed ones have their own."""
    forward: Any = nn.Linear.forward
    source = getattr(forward, "__globals__", {}).get("__name__")  # a wrapper may pretend to be what it wraps
    if source != nn.Linear.__module__:
        raise PackedError(
            f"torch.nn.Linear.forward is replaced for the whole process (by {source or type(forward).__name__}, as "
            "some extensions do to add a LoRA), and packed linears would not do what it does. Put PyTorch's own "
            "function back and pack then, and load a LoRA with load_lora_weights or peft. Or compile the model as it "
            'is: torch.compile(model, backend="tahf4") sees what replaces it.'
        )


def _check_not_hooked(path: str, linear: nn.Module, advice: str) -> None:
    """Raise :class:`PackedError` for a linear whose ``forward`` is replaced: the hook would go on calling the old one.

    accelerate leaves a linear's own ``forward`` as an attribute where it takes a hook off.
    """
    forward = linear.__dict__.get("forward")
    if forward is not None and forward != type(linear).forward.__get__(linear):
        raise PackedError(f"{path} is hooked (its forward is replaced, as offloading does). {advice}")
