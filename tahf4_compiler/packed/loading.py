"""Packed models through the loaders and savers of libraries: what diffusers and transformers have in common."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PackedError, RecipeError
from ..format import hif4
from ..format.spans import span_name
from ..model.attachments import Attachment, leave_as_they_are
from ..model.reasons import Cause, Reason
from ..model.steps import StepPrecision
from ..recipe.apply import recipe_attention
from ..recipe.recipe import Recipe
from ..weights.checksum import checksum
from ..weights.flaws import Flaws
from .attention import attach_attention, attention_said
from .config import Method, TaHF4Config, arguments, describe
from .convert import observers, pack_modules, packed_linears
from .linear import HiF4Linear
from .plan import plan_modules, plan_transforms
from .state import PARTS
from .steps import attach_steps, steps_of
from .transform import Transform

__all__ = ["Loading", "Owner", "Saving"]


class Loading:
    """What happens to a model while a library loads it: packed as it is, or packed as its weights arrive.

    Attributes:
        config: a copy of the settings; two components may be given the same object.
        transforms: of the linears that are packed as they arrive, by module path.
    """

    def __init__(self, config: TaHF4Config) -> None:
        """Keep the settings."""
        self.config = copy.copy(config)
        self.transforms: dict[str, Transform] = {}
        self._reasons: dict[str, str] = {}
        self._sums: dict[str, int] = {}
        self._attention: dict[str, Attachment] = {}
        self._flaws = Flaws()

    def begin(self, model: nn.Module, packed: bool, keys: Set[str] = frozenset()) -> None:
        """Prepare a model without values.

        Args:
            model: on the meta device.
            packed: whether the weights are those of a packed model.
            keys: names of the tensors to come, as far as they are known.

        Raises:
            PackedError: the settings do not fit the model or the weights.
            RecipeError: the recipe does not fit the model.
            PatternError: a pattern of ``keep`` matches no linear.
        """
        config = self.config
        if packed:
            _put_empty(model, config, keys)
            listed = config.linears.items()
            self._attention = {path: said for path, v in listed if (said := attention_said(v)) is not None}
            return
        if config.linears:
            raise PackedError(
                "quantization_config describes a packed model, and the weights to load are plain. Make a new one, "
                "TaHF4Config(recipe=..., keep=...), to pack them."
            )
        plan = plan_modules(model, config.recipe, config.keep, expert=config.expert)
        self.transforms = plan_transforms(model, plan, config.recipe, expert=config.expert, span=config.form)
        self._reasons = {d.module: d.reason for d in plan if d.decision != "hif4"}
        if config.recipe is not None:
            self._attention = recipe_attention(model, config.recipe, expert=config.expert)
        if config.recipe is not None and config.check_weights:
            name = config.expert if config.expert is not None else next(iter(config.recipe.experts))
            self._sums = {path: linear.weight_sum for path, linear in config.recipe.linears(name).items()}

    def check_plain(self, keys: Iterable[str]) -> None:
        """Raise :class:`PackedError` for tensors of a packed model, which nothing says to be packed."""
        if any(key.endswith(".weight_codes") for key in keys):
            raise PackedError(
                "the checkpoint holds packed linears, but the settings that say how they were packed were not read "
                "with it. Load the folder with its config.json by from_pretrained(folder), without "
                "quantization_config; from_single_file reads plain weights only."
            )

    def check_packed(self, keys: Iterable[str]) -> None:
        """Raise :class:`PackedError` if all tensors are plain, and the settings say that they are packed."""
        if self.config.linears and not any(key.endswith(".weight_codes") for key in keys):
            raise PackedError(
                "config.json describes a packed model, and the weights beside it are plain, as those of a model that "
                "was made with the configuration of a packed one (from_config). Delete quantization_config from "
                "config.json."
            )

    def pack(self, model: nn.Module, path: str, weight: Tensor) -> HiF4Linear:
        """Pack a weight ``[N, K]`` that has arrived, and put a packed linear in the place of its linear.

        Raises:
            RecipeError: it is not the weight that was calibrated.
        """
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        if path in self._sums and int(checksum(weight)) != self._sums[path]:
            raise RecipeError(
                f"{path} has other weights than those that were calibrated, in this precision. "
                "TaHF4Config(..., check_weights=False) accepts them."
            )
        linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        with torch.no_grad():
            pack_modules(model, {path: self.transforms[path]}, self._flaws)
        found = model.get_submodule(path)
        assert isinstance(found, HiF4Linear)
        return found

    def finish(self, model: nn.Module, packed: bool, arrived: Callable[[nn.Parameter], bool]) -> None:
        """Check that every packed linear is whole, and let the others stay as they are wherever the model is compiled.

        Args:
            model: loaded.
            packed: as for :meth:`begin`.
            arrived: whether a parameter was in the checkpoint.

        Raises:
            PackedError: the checkpoint lacked tensors, or held some of another dtype.
        """
        found = packed_linears(model)
        expected = self.config.linears if packed else self.transforms

        def whole(linear: nn.Module) -> bool:
            return all(arrived(value) and not value.is_meta for value in linear.parameters())

        lacking = [path for path in expected if path not in found or not whole(found[path])]
        if lacking:
            raise PackedError(
                f"the checkpoint lacks tensors of {len(lacking)} packed linears ({', '.join(lacking[:3])}); it is not "
                "complete, or they are left on disk (device_map, offload_folder): load a packed model into memory"
            )
        for path, linear in found.items():
            for leaf, dtype in PARTS.items():
                value = linear._parameters[leaf]
                if value is not None and value.dtype != dtype:
                    raise PackedError(f"{path}.{leaf} is of {value.dtype}, expected {dtype}; the checkpoint is damaged")
            if linear.span != 1 and not hif4.scales_hold_span(linear.weight_scales, linear.span):
                raise PackedError(
                    f"{path} has scale_span {span_name(linear.span)!r} in quantization_config, and the level-1 scales "
                    "of its units differ; the checkpoint is damaged"
                )
            if linear.bias is not None:
                linear.weight_dtype = linear.bias.dtype
        self._flaws.warn(self.config.expert or "")
        if packed:
            self._reasons = not_packed(model)
        leave_as_they_are(model, self._reasons)
        attach_attention(model, self._attention)
        if self.config.high_precision_steps:  # nobody counts them yet: see set_high_precision_steps
            bits = self.config.step_activation_bits
            attach_steps(model, StepPrecision(None, self.config.high_precision_steps, bits))
        self.config.linears = describe(model)


def not_packed(model: nn.Module) -> dict[str, str]:
    """Return why linears of a model that was loaded packed are not, for :func:`leave_as_they_are`."""
    plain = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, HiF4Linear)]
    boundary = {d.module: d.reason for d in plan_modules(model) if d.cause is Cause.BOUNDARY}
    missing = Reason(Cause.NOT_PACKED, "not packed in the checkpoint")
    return {path: boundary.get(path, missing) for path in plain}


class Saving:
    """Lets the models of a library save themselves as packed; see ``PackingObserver``.

    Attributes:
        quantizer: the class of the library's quantizer that this project brings.
    """

    def __init__(
        self,
        quantizer: type[Any],
        kind: Callable[[], type[nn.Module]],
        empty: Callable[[Any], nn.Module],
        tell: Callable[[Any, TaHF4Config], None],
        forget: Callable[[Any], None],
    ) -> None:
        """Keep what differs between libraries.

        Args:
            quantizer: see the class.
            kind: gives the class of the library's models.
            empty: makes what ``from_pretrained`` puts the tensors of a saved model into, without values.
            tell: writes the settings into a model's configuration.
            forget: takes settings and quantizer off a model that is plain again.
        """
        self.quantizer, self._kind, self._empty, self._tell, self._forget = quantizer, kind, empty, tell, forget

    def register(self) -> None:
        """See every model that is packed or unpacked from now on."""
        if not any(isinstance(other, Saving) and other.quantizer is self.quantizer for other in observers):
            observers.append(self)

    def packed(self, model: nn.Module, recipe: Recipe | None, keep: Sequence[str]) -> None:
        """See a model some linears of which are packed now."""
        for found in self._models(model):
            old = getattr(getattr(found, "hf_quantizer", None), "quantization_config", None)
            config = TaHF4Config(recipe, keep=keep)
            if isinstance(old, TaHF4Config):  # some linears were packed before
                config.keep = tuple(dict.fromkeys([*old.keep, *config.keep]))
                config.provenance = config.provenance if recipe is not None else old.provenance
            self.remember(found, config)

    def unpacked(self, model: nn.Module) -> None:
        """See a model whose linears are plain again."""
        for found in model.modules():
            if isinstance(found, self._kind()) and isinstance(getattr(found, "hf_quantizer", None), self.quantizer):
                self._forget(found)

    def remember(self, model: Any, config: TaHF4Config) -> None:
        """Let a packed model's ``save_pretrained`` write how it is packed."""
        config.linears = describe(model)
        if getattr(model, "hf_quantizer", None) is None:
            model.hf_quantizer = self.quantizer(config, pre_quantized=True)
        quantizer = model.hf_quantizer
        if not isinstance(quantizer, self.quantizer):
            return  # something else quantized the model before, and says how
        quantizer.quantization_config, quantizer.owner = config, Owner(model)
        model.is_quantized, model.quantization_method = True, Method.TAHF4
        self._tell(model, config)

    def update(self, quantizer: Any) -> None:
        """Let the settings list what a model holds now, before they are saved.

        Adapters and fused projections come and go after a model was packed, and parts of it are unpacked.

        Raises:
            PackedError: ``from_pretrained`` would make a model of another structure, or values are not in memory.
        """
        model, config = quantizer.owner(), quantizer.quantization_config
        if model is None:
            raise PackedError(
                "the packed model that this one shares its parts with (copy.copy) is gone, and its settings went with "
                "it. Make copies with copy.deepcopy."
            )
        _check_values(model)
        config.linears = describe(model)
        if not config.linears:  # unpacked in parts
            self._forget(model)
            return
        steps = steps_of(model)
        config.high_precision_steps = steps.steps if steps is not None else ()
        config.step_activation_bits = steps.bits if steps is not None else None
        try:
            again = self._empty(model)
            _put_empty(again, config, frozenset())
            _check_same(_shapes(model), _shapes(again), type(model).__name__)
        except PackedError as error:
            raise PackedError(
                f"the saved folder could not be loaded: {str(error).removesuffix('.')}. A folder holds a model in the "
                "structure that its class gives it. Take adapters off first (unload_lora of diffusers, unload of a "
                "PeftModel; peft.get_peft_model_state_dict gives their own state to save), and undo fused projections "
                "(unfuse_qkv_projections)."
            ) from error

    def _models(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the library's outermost models in a model, itself perhaps, that hold packed linears."""
        if isinstance(model, self._kind()):
            if packed_linears(model):
                yield model
            return
        for child in model.children():
            yield from self._models(child)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model, by each of its names."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _check_same(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], name: str) -> None:
    """Raise :class:`PackedError` if a model has other parameters than the one that its class makes."""
    if found == wanted:
        return
    more, less = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    other = [n for n in found if n in wanted and found[n] != wanted[n]]
    differ = {"it has": more, "it lacks": less, "of another shape:": other}
    words = "; ".join(f"{what} {', '.join(names[:3])}" for what, names in differ.items() if names)
    raise PackedError(f"its parameters are not those that {name} makes ({words})")


def _check_values(model: nn.Module) -> None:
    """Raise :class:`PackedError` if values of a model are on disk, or in a type that only stores them."""
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        on_disk = getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None
        if on_disk or any(parameter.is_meta for parameter in module._parameters.values() if parameter is not None):
            raise PackedError(
                f"values of {path or 'the model'} are offloaded, and what is in memory in their places is not the "
                "model. Save the model before you offload it."
            )
        if isinstance(module, HiF4Linear) and module.weight_dtype.itemsize == 1:
            raise PackedError(
                f"{path} is stored in {module.weight_dtype} (enable_layerwise_casting), which a packed model is not "
                "loaded in. Save the model before you enable it."
            )


class Owner:
    """The model that a quantizer belongs to, which holds the quantizer; a copy of the model gets a copy of this."""

    def __init__(self, model: nn.Module) -> None:
        """Hold a model as long as others do."""
        self._model = weakref.ref(model)

    def __call__(self) -> Any:
        """Return the model, or None after it is gone."""
        return self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        """Return the owner of a copy."""
        model: Any = self()
        return Owner(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        """Let it be pickled with its model."""
        return Owner, (self(),)


def _put_empty(model: nn.Module, config: TaHF4Config, keys: Set[str]) -> None:
    """Put empty packed linears in the places that a checkpoint names.

    A bias arrives in the dtype of its linear's weight. Without one, the dtype is that in which the library made the
    model, or the saved one where the library keeps a weight in float32.
    """
    wide = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for path, values in config.linears.items():
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = nn.Identity()
        if type(linear) is not nn.Linear:
            raise PackedError(
                f"the checkpoint has a packed linear {path}; {type(model).__name__} has none there. Load it with the "
                "class that was packed, or load a part of the original with its own class, and pack that."
            )
        if (linear.in_features, linear.out_features) != (values["k"], values["n"]):
            raise PackedError(
                f"the checkpoint has {path} with {values['k']} -> {values['n']} features; the model has "
                f"{linear.in_features} -> {linear.out_features}"
            )
        parent, _, name = path.rpartition(".")
        empty = HiF4Linear(
            values["k"],
            values["n"],
            linear.bias is not None,
            **arguments(values),
            multiplies=values.get("multiplier", not keys or f"{path}.multiplier" in keys),
            device="meta",
            dtype=getattr(torch, values["dtype"]) if wide.intersection(path.split(".")) else linear.weight.dtype,
        )
        setattr(model.get_submodule(parent), name, empty.train(linear.training))
