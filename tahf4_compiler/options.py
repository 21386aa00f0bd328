"""The options of the backend, validated once, frozen and comparable."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import OptionError, PatternError

__all__ = [
    "ACTIVATION_BITS",
    "PROTECTING_BITS",
    "Options",
    "activation_bits",
    "bits_for",
    "check_protecting_bits",
    "patterns",
    "reference_forced",
    "rounding",
    "scale_span",
]

WEIGHT_CHECKS = ("auto", "content", "version")
KERNELS = ("best", "reference")
ATTENTION = ("high_precision", "int8", "hif4")
"""Of ``scaled_dot_product_attention``: as it is; operands of 8 bits; the same with queries and keys in HiF4."""
ROUNDINGS = ("half_away", "bfloat16_half_away", "least_error")
ACTIVATION_BITS = (4, 8, 16)
"""What an activation may have: HiF4; int8 with a float32 scale for each unit of 64 values; 16 bits, not quantized."""
PROTECTING_BITS = (None, 8, 16)
"""What protects a linear or a step: activations of so many bits on weights in HiF4, or None, the original weights."""


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="tahf4", options={...})`` accepts.

    Attributes:
        keep: regular expressions, searched in module paths; linears that match stay in high precision.
            One that matches no linear is an error.
        activation_bits: bits of the activations of linears that run in HiF4: 4 (HiF4), 8 (int8 with a float32 scale
            for each unit of 64 values) or 16 (not quantized; the weight is dequantized in each call). A number for all
            linears, or a mapping of regular expressions, searched in module paths, to numbers: the first that matches
            counts, and one that matches no linear is an error.
            Other linears have 4, or what their packed module says (:attr:`tahf4_compiler.HiF4Linear.activation_bits`).
        scale_span: how many units of 64 values of a row share a level-1 scale, in activations and weights: 1, 2 or 4,
            or ``"row"`` for all; kept as a number, 0 for a row. Kernels for the CPU multiply such operands faster
            (:class:`tahf4_compiler.passes.span.Span`). A recipe's own span comes first, and packed linears keep
            theirs.
        rounding: of activations and weights (:func:`tahf4_compiler.hif4.quantize`): ``"half_away"``,
            ``"bfloat16_half_away"``, as in the specification for hardware, or ``"least_error"``, which chooses the
            level-1 scale of each unit among four by their error, and takes more time. A recipe's own comes first, and
            packed linears keep theirs.
        attention: ``"high_precision"``, or ``"int8"`` to run ``scaled_dot_product_attention`` with operands of 8 bits
            where it can (see :class:`tahf4_compiler.passes.attention.Attention`), or ``"hif4"`` for queries and keys
            in HiF4 there.
        passes: passes to add: instances or classes of :class:`tahf4_compiler.Pass`.
        disable_passes: names of passes to leave out.
        dump_dir: folder for graphs, plan and report of each compiled graph; by default ``TAHF4_DUMP_DIR``.
        inductor: True (compile the lowered graph with Inductor), False (run it as it is), or a mapping of
            Inductor's own options.
        verify: run the graph before and after each pass on the example inputs and report the error.
        verify_tolerance: with it ``verify`` is on, and a pass raises that adds a larger relative error although it says
            that it changed nothing (``modified=False``) or only how something is computed (:attr:`Pass.exact`).
        weight_check: how a changed weight is noticed at each call: ``"content"`` (a checksum of its bytes, which
            reads it), ``"version"`` (its version counter and address, and whether its ``.data`` was asked for: it is
            read only if one of them says so) or ``"auto"``, the first on the CPU and the second elsewhere.
        kernels: ``"best"``, or ``"reference"`` to run every operator as its plain-PyTorch reference and to fuse
            nothing; by default ``TAHF4_KERNELS``, which counts for the packing of weights as well.
        pipeline: name of the pipeline that runs, ``"default"`` or another that a package brings (entry points of the
            group ``tahf4.pipelines``). Passes that joined by :func:`tahf4_compiler.register_pass` run in the default.
        pass_options: ``(pass name, option) -> value``; written ``"plan.min_features": 128`` in ``options=``.
    """

    keep: tuple[str, ...] = ()
    activation_bits: tuple[tuple[str, int], ...] = ()
    scale_span: int = 1
    rounding: str = "half_away"
    attention: str = "high_precision"
    passes: tuple[Any, ...] = ()
    disable_passes: tuple[str, ...] = ()
    dump_dir: str | None = None
    inductor: bool | tuple[tuple[str, Any], ...] = True
    verify: bool = False
    verify_tolerance: float | None = None
    weight_check: str = "auto"
    kernels: str = "best"
    pipeline: str = "default"
    pass_options: tuple[tuple[str, str, Any], ...] = field(default=())

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None = None, mode: str | None = None) -> Options:
        """Validate the mapping that ``torch.compile(options=...)`` hands over.

        Args:
            options: names and values; a dotted name is an option of a pass. Or options that were parsed before.
            mode: ``torch.compile(mode=...)``: the Inductor options that the mode stands for.

        Raises:
            OptionError: an unknown name, or a value of the wrong type.
            PatternError: an entry of ``keep`` is no regular expression.
        """
        if isinstance(options, Options):
            return options if mode in (None, "default") else replace(options, inductor=_mode(mode, options.inductor))
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is a {type(options).__name__}; expected a mapping of names to values")
        known = {f.name for f in dataclasses.fields(cls)} - {"pass_options"}
        values: dict[str, Any] = {}
        pass_options: list[tuple[str, str, Any]] = []
        for name, value in (options or {}).items():
            if isinstance(name, str) and "." in name:
                pass_name, _, option = name.partition(".")
                pass_options.append((pass_name, option, _freeze(value)))
            elif name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(
                    f"unknown option {name!r} of backend 'tahf4'.{hint} Known options: {', '.join(sorted(known))}; "
                    "an option of a pass is written 'pass.option' (`tahf4 passes` lists them)."
                )
            else:
                values[name] = _CONVERT[name](name, value)
        if values.get("verify_tolerance") is not None:
            if values.get("verify") is False:
                raise OptionError("option 'verify_tolerance' is set and 'verify' is False; leave one of them out")
            values["verify"] = True
        rounding("option 'rounding'", values.get("rounding", "half_away"), values.get("scale_span", 1))
        values.setdefault("dump_dir", os.environ.get("TAHF4_DUMP_DIR") or None)
        values.setdefault("kernels", "reference" if reference_forced() else "best")
        if mode is not None and mode != "default":
            values["inductor"] = _mode(mode, values.get("inductor", True))
        return cls(pass_options=tuple(sorted(pass_options, key=lambda o: o[:2])), **values)

    def inductor_options(self) -> dict[str, Any] | None:
        """Return Inductor's options, or None where the lowered graph runs as it is."""
        if self.inductor is False:
            return None
        return {} if self.inductor is True else dict(self.inductor)


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _mode(mode: str, inductor: Any) -> tuple[tuple[str, Any], ...]:
    import torch._inductor

    try:
        patches = torch._inductor.list_mode_options(mode)
    except Exception as error:
        raise OptionError(f"mode={mode!r} is not one of torch.compile's modes: {error}") from error
    return tuple({**patches, **dict(inductor if isinstance(inductor, tuple) else ())}.items())


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise OptionError(f"option {name!r} is {value!r}; expected a list of strings")
    return tuple(value)


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """Return regular expressions as a tuple, checked."""
    for pattern in _strings(name, value):
        try:
            re.compile(pattern)
        except re.error as error:
            raise PatternError(f"{pattern!r} in option {name!r} is not a regular expression: {error}") from error
    return tuple(value)


def check_protecting_bits(name: str, value: Any) -> None:
    """Raise :class:`OptionError` unless a value is one of :data:`PROTECTING_BITS`."""
    if type(value) not in (int, type(None)) or value not in PROTECTING_BITS:
        raise OptionError(f"{name} is {value!r}; expected 8 (int8), 16 (not quantized) or None")


def activation_bits(name: str, value: Any) -> tuple[tuple[str, int], ...]:
    """Return (regular expression, bits) of what was given for the bits of activations, checked."""
    given = value if isinstance(value, Mapping) else {"": value}
    for pattern, bits in given.items():
        if type(bits) is not int or bits not in ACTIVATION_BITS or not isinstance(pattern, str):
            raise OptionError(
                f"option {name!r} is {value!r}; expected 4 (HiF4), 8 (int8), 16 (not quantized), or a mapping of "
                "regular expressions to these numbers"
            )
    patterns(name, list(given))
    return tuple(given.items())


def bits_for(paths: Iterable[str], given: Sequence[tuple[str, int]], default: int = 4) -> int:
    """Return the bits of the activation of a linear that has some paths, of what :func:`activation_bits` returned."""
    return next((bits for pattern, bits in given if any(re.search(pattern, path) for path in paths)), default)


def scale_span(name: str, value: Any) -> int:
    """Return a span as a number of units, 0 for a row; checked."""
    if value == "row":
        return 0
    if value == "auto":
        raise OptionError(
            f"{name} is 'auto', which chooses by errors that only a calibration measures: make a recipe with "
            "calibration.recipe(scale_span='auto'), and leave the option out, or give 1, 2, 4 or 'row'"
        )
    if type(value) is not int or value not in (1, 2, 4):
        raise OptionError(f"{name} is {value!r}; expected 1, 2 or 4 units that share a level-1 scale, or 'row' for all")
    return value


def rounding(name: str, value: Any, scale_span: int | str = 1) -> str:
    """Return the rounding of activations and weights, checked, also against how many units share a level-1 scale."""
    if value not in ROUNDINGS:
        raise OptionError(f"{name} is {value!r}; expected one of {', '.join(map(repr, ROUNDINGS))}")
    if value == "least_error" and scale_span != 1:
        raise OptionError(
            f"{name} is 'least_error', which chooses a level-1 scale for each unit, and scale_span is "
            f"{scale_span or 'row'!r}, so that units may share one; leave one of the two out"
        )
    return str(value)


def _passes(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise OptionError(f"option {name!r} is {value!r}; expected a list of passes")
    return tuple(value)


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"option {name!r} is {value!r}; expected True or False")
    return value


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise OptionError(f"option {name!r} is {value!r}; expected a number that is not negative, such as 1e-3")
    return float(value)


def _path(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise OptionError(f"option {name!r} is {value!r}; expected a path")
    return os.fspath(value)


def _inductor(name: str, value: Any) -> bool | tuple[tuple[str, Any], ...]:
    if isinstance(value, Mapping):
        import torch._inductor

        known = torch._inductor.list_options()
        for option in value:
            if str(option).replace("-", "_") not in known:
                near = difflib.get_close_matches(str(option), known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"option {name!r} names {option!r}, which Inductor does not have.{hint}")
        return tuple(value.items())
    if not isinstance(value, bool):
        raise OptionError(f"option {name!r} is {value!r}; expected True, False or a mapping of Inductor's options")
    return value


def reference_forced() -> bool:
    """Whether ``TAHF4_KERNELS=reference`` is set.

    Raises:
        OptionError: it is set to something else than a value of the option ``kernels``.
    """
    return _kernels("TAHF4_KERNELS", os.environ.get("TAHF4_KERNELS") or "best") == "reference"


def _kernels(name: str, value: Any) -> str:
    if value not in KERNELS:
        raise OptionError(f"option {name!r} is {value!r}; expected one of {', '.join(map(repr, KERNELS))}")
    return str(value)


def _attention(name: str, value: Any) -> str:
    if value not in ATTENTION:
        raise OptionError(f"option {name!r} is {value!r}; expected one of {', '.join(map(repr, ATTENTION))}")
    return str(value)


def _pipeline(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OptionError(f"option {name!r} is {value!r}; expected the name of a pipeline")
    return value


def _weight_check(name: str, value: Any) -> str:
    if value not in WEIGHT_CHECKS:
        raise OptionError(f"option {name!r} is {value!r}; expected one of {', '.join(map(repr, WEIGHT_CHECKS))}")
    return value


_CONVERT = {
    "keep": patterns,
    "activation_bits": activation_bits,
    "scale_span": lambda name, value: scale_span(f"option {name!r}", value),
    "rounding": lambda name, value: rounding(f"option {name!r}", value),
    "attention": _attention,
    "passes": _passes,
    "disable_passes": _strings,
    "dump_dir": _path,
    "inductor": _inductor,
    "verify": _bool,
    "verify_tolerance": _tolerance,
    "pipeline": _pipeline,
    "weight_check": _weight_check,
    "kernels": _kernels,
}
