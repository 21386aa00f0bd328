"""What ``config.json`` says about a packed model, and what a quantization while loading is asked for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, PackedError, RecipeError
from ..format import hif4
from ..format.spans import FORM_ROUNDINGS, SPANS, joined, span_name
from ..options import ACTIVATION_BITS, patterns
from ..options import rounding as check_rounding
from ..options import scale_span as check_scale_span
from ..recipe.checks import check_steps
from ..recipe.recipe import Recipe
from .attention import ATTENTION_KEYS, attention_of, attention_words
from .convert import packed_linears

__all__ = ["FORMAT_VERSION", "Method", "TaHF4Config", "arguments", "describe", "stand_ins"]

FORMAT_VERSION = 1
_WITH_BRANCHES = 2  # of a model that has low-rank branches, which version 1 does not know
_OTHERWISE_ROUNDED = 3  # of one whose activations are rounded as versions 1 and 2 do not, branches or not
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_KEYS = {"k": int, "n": int, "hadamard_block": int, "activation": str, "dtype": str}


class Method(StrEnum):
    """The name under which diffusers and transformers find the quantizer."""

    TAHF4 = "tahf4"


class TaHF4Config:
    """How a model is quantized while it is loaded, or how the one in a folder was: ``quantization_config=``.

    One class for diffusers and transformers, and for a process that has only one of them: it has the methods that both
    ask a configuration for, and none of their classes.

    Attributes:
        recipe: see :class:`tahf4_compiler.Recipe`, or None.
        keep: regular expressions, searched in module paths: linears that stay in high precision.
        expert: which expert's part of the recipe belongs to the model.
        check_weights: compare the weights with those that were calibrated.
        scale_span: units that share a level-1 scale, where no recipe says another.
        rounding: the same.
        linears: of a packed model: by module path ``k``, ``n``, ``hadamard_block``, ``activation``, ``dtype``;
            ``multiplier`` is False for one that has none, ``activation_bits`` for one whose activation has not 4,
            ``rank`` for one that has a low-rank branch, ``scale_span`` for one whose units share level-1 scales: 2, 4
            or ``"row"``, ``rounding`` for one whose elements are rounded in another way than ``"half_away"``,
            ``attention`` for one whose module's attention stays in high precision, and why, ``attention_in_8_bits``
            for one whose attention stays in int8.
        provenance: of the recipe of a packed model.
        high_precision_steps: of the recipe, or of the packed model (:func:`tahf4_compiler.set_high_precision_steps`).
        step_activation_bits: in these steps.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        *,
        keep: Sequence[str] = (),
        expert: str | None = None,
        check_weights: bool = True,
        scale_span: int | str = 1,
        rounding: str = "half_away",
        linears: Mapping[str, Mapping[str, Any]] | None = None,
        high_precision_steps: Sequence[int] = (),
        step_activation_bits: int | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = Method.TAHF4.value,
        **others: Any,
    ) -> None:
        """Check and keep what is given.

        Args:
            recipe: a recipe or its file; from ``config.json``, the provenance of the recipe that was used.
            keep: see the class.
            expert: see the class.
            check_weights: see the class.
            scale_span: as for :func:`tahf4_compiler.quantize_`.
            rounding: see there.
            linears: see the class; only in ``config.json``.
            high_precision_steps: see the class; only in ``config.json``.
            step_activation_bits: see the class; only in ``config.json``.
            format_version: of the packed form.
            quant_method: ``"tahf4"``.
            others: further keys of a packed model's ``config.json``, kept.

        Raises:
            PackedError: another format version or method, or a damaged description of a linear.
            PatternError: an entry of ``keep`` is no regular expression.
            OptionError: span or rounding is unknown, or another option is.
            RecipeError: the recipe's file cannot be read, the steps in ``config.json`` are damaged, or steps are given
                beside a recipe.
        """
        if str(getattr(quant_method, "value", quant_method)) != Method.TAHF4.value:
            raise PackedError(f"quant_method is {quant_method!r}; expected 'tahf4'")
        known = (FORMAT_VERSION, _WITH_BRANCHES, _OTHERWISE_ROUNDED)
        if format_version not in known or type(format_version) is not int:
            raise PackedError(
                f"the model was packed in format version {format_version!r}; this tahf4 reads "
                f"{', '.join(map(str, known))}. Update tahf4, or quantize the original again."
            )
        self.quant_method = Method.TAHF4
        self.keep, self.expert, self.check_weights = patterns("keep", list(keep)), expert, check_weights
        # A packed linear says its own. Earlier versions wrote here what they did not use.
        self.scale_span, self.rounding = (1, FORM_ROUNDINGS[0]) if linears else (scale_span, rounding)
        _ = self.form
        if others and linears is None:
            raise OptionError(
                f"TaHF4Config got {', '.join(map(repr, others))}, which it does not know; there are recipe, keep, "
                "expert, check_weights, scale_span and rounding"
            )
        self.linears = _checked(linears if linears is not None else {})
        where = "quantization_config"
        self.high_precision_steps, self.step_activation_bits = check_steps(
            high_precision_steps, step_activation_bits, where
        )
        self.others = others
        self.recipe: Recipe | None = None
        self.provenance: Mapping[str, Any] | None = None
        if isinstance(recipe, Mapping):
            self.provenance = recipe
        elif recipe is not None:
            if self.high_precision_steps or step_activation_bits is not None:
                raise RecipeError(
                    "TaHF4Config got a recipe, and steps beside it, which are part of the recipe: "
                    "dataclasses.replace(recipe, high_precision_steps=..., step_activation_bits=...)"
                )
            self.recipe = Recipe.load(recipe) if isinstance(recipe, str | Path) else recipe
            self.provenance = dict(self.recipe.provenance)
            self.high_precision_steps = self.recipe.high_precision_steps
            self.step_activation_bits = self.recipe.step_activation_bits

    @property
    def form(self) -> int:
        """Span and rounding as one number (:mod:`tahf4_compiler.format.spans`)."""
        span, name = check_scale_span("scale_span", self.scale_span), self.rounding
        return joined(span, check_rounding("rounding", name, self.scale_span))

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        return {
            **copy.deepcopy(self.others),
            "quant_method": Method.TAHF4.value,
            "format_version": _version(self.linears.values()),
            "linears": copy.deepcopy(dict(self.linears)),
            "keep": list(self.keep),
            "recipe": copy.deepcopy(dict(self.provenance)) if self.provenance is not None else None,
            **({"high_precision_steps": list(self.high_precision_steps)} if self.high_precision_steps else {}),
            **({} if (bits := self.step_activation_bits) is None else {"step_activation_bits": bits}),
            **({} if self.linears or self.form == 1 else {"scale_span": self.scale_span, "rounding": self.rounding}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return :meth:`to_dict`: all of it is needed to load the model again."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return what a ``config.json`` says; with ``return_unused_kwargs`` also what is no setting."""
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set those that are settings, and return the others."""
        unused = {key: value for key, value in kwargs.items() if not hasattr(self, key)}
        self.__dict__.update({key: value for key, value in kwargs.items() if key not in unused})
        return unused

    def __repr__(self) -> str:
        """Return the settings and the number of packed linears."""
        return f"TaHF4Config(recipe={self.provenance}, keep={list(self.keep)}, linears={len(self.linears)})"


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the ``linears`` of ``config.json`` for a packed model."""
    attention = attention_of(model)
    return {
        path: {
            "k": linear.in_features,
            "n": linear.out_features,
            "hadamard_block": linear.hadamard_block,
            "activation": linear.activation,
            "dtype": str(linear.weight_dtype).removeprefix("torch."),
            **({} if linear.multiplier is not None else {"multiplier": False}),
            **({} if linear.activation_bits == 4 else {"activation_bits": linear.activation_bits}),
            **({"rank": linear.rank} if linear.rank else {}),
            **({"scale_span": span_name(linear.span)} if linear.span != 1 else {}),
            **({"rounding": linear.rounding} if linear.rounding != FORM_ROUNDINGS[0] else {}),
            **attention_words(attention.get(path)),
        }
        for path, linear in packed_linears(model).items()
    }


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`describe` for one linear.

    Returns:
        The arguments of :class:`tahf4_compiler.HiF4Linear`, but for features, bias, multiplier, dtype and device.
    """
    return {
        "hadamard_block": values["hadamard_block"],
        "activation": values["activation"],
        "activation_bits": values.get("activation_bits", 4),
        "rank": values.get("rank", 0),
        "span": values.get("scale_span", 1),
        "rounding": values.get("rounding", FORM_ROUNDINGS[0]),
    }


def stand_ins(linears: Iterable[str]) -> dict[str, Tensor]:
    """Return what a folder holds in the places of weights that are packed: uint8 ``[1]`` each, by name.

    Their shape is wrong on purpose. Whoever loads a folder as a plain model, because tahf4 was not imported or
    ``config.json`` is the original one, would leave these weights random. Libraries refuse a wrong shape.
    """
    return {f"{path}.weight": torch.zeros(1, dtype=torch.uint8, device="cpu") for path in linears}


def _version(linears: Iterable[Mapping[str, Any]]) -> int:
    """Return the oldest version that knows what the linears of a model are: tahf4 of an older one must refuse it."""
    found = FORMAT_VERSION
    for values in linears:
        if values.get("rounding", FORM_ROUNDINGS[0]) != FORM_ROUNDINGS[0]:
            return _OTHERWISE_ROUNDED
        found = _WITH_BRANCHES if "rank" in values else found
    return found


def _checked(linears: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(linears, Mapping):
        raise PackedError(f"'linears' in quantization_config is a {type(linears).__name__}; expected an object")
    for path, values in linears.items():
        where = f"linears[{path!r}] in quantization_config"
        if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)*", path):
            raise PackedError(f"{where}: no module path")
        if not isinstance(values, Mapping) or any(type(values.get(key)) is not kind for key, kind in _KEYS.items()):
            raise PackedError(f"{where} is {values!r}; expected {', '.join(_KEYS)}")
        if not isinstance(values.get("multiplier", False), bool):
            raise PackedError(f"{where}: multiplier is {values['multiplier']!r}, expected true or false")
        if (bits := values.get("activation_bits", 4)) not in ACTIVATION_BITS or type(bits) is not int:
            raise PackedError(f"{where}: activation_bits is {bits!r}, expected 4, 8 or 16; the file is damaged")
        if type(rank := values.get("rank", 1)) is not int or rank < 1:
            raise PackedError(f"{where}: the rank of its branch is {rank!r}; the file is damaged")
        if type(span := values.get("scale_span", 1)) not in (int, str) or span not in SPANS:
            raise PackedError(f"{where}: scale_span is {span!r}, expected 1, 2, 4 or 'row'; the file is damaged")
        if (rounding := values.get("rounding", FORM_ROUNDINGS[0])) not in FORM_ROUNDINGS:
            known = ", ".join(map(repr, FORM_ROUNDINGS))
            raise PackedError(f"{where}: rounding is {rounding!r}, expected one of {known}; is the file newer?")
        if rounding == "least_error" and span != 1:
            raise PackedError(f"{where}: rounding is {rounding!r} and scale_span {span!r}, expected 1; it is damaged")
        for key in ATTENTION_KEYS:
            if not isinstance(why := values.get(key, ""), str):
                raise PackedError(f"{where}: {key} is {why!r}, expected a reason in words; the file is damaged")
        k, n, block = values["k"], values["n"], values["hadamard_block"]
        if k < 1 or n < 1 or values["dtype"] not in _DTYPES:
            raise PackedError(f"{where}: k={k}, n={n}, dtype={values['dtype']!r}; the file is damaged")
        padded = hif4.units(k) * hif4.UNIT
        if block < 0 or block & (block - 1) or (block and padded % block):
            raise PackedError(f"{where}: hadamard_block is {block}, expected 0 or a power of two that divides {padded}")
    return {path: dict(values) for path, values in linears.items()}

