"""A linear that holds its weight in HiF4 alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, PackedError
from ..format import hif4, int8
from ..format.low_rank import LowRank
from ..format.spans import joined, parted, span_name, units_of
from ..format.transforms import hadamard
from ..model.attachments import by_step, step_bits
from ..ops import registry
from ..ops.packed_linear import packed_product
from ..torch_private.tensors import takes_data
from .no_weight import NoWeight, no_weight
from .saving import check_saver, compares_shapes
from .spans import require_span
from .state import check_state

__all__ = ["BRANCH", "HiF4Linear"]

BRANCH = ("low_rank_a", "low_rank_b")
"""Those of a branch, which have the dtype of the bias."""

torch.fx.wrap("packed_product")  # as where it is defined
registry.kernels()  # defines the operators that forward calls, before anything traces it


class HiF4Linear(nn.Linear):
    """A W4A4 linear without its original weight: ``y = x W^T + b`` with both sides in HiF4.

    The activation is transformed as ``tahf4::quantize`` says, and the weight was by the inverse before it was packed.
    Codes, scales and multiplier are parameters without gradients, so that everything that moves, shards or saves
    parameters finds them. Casts of the module leave all three as they are.

    Attributes:
        in_features: K.
        out_features: N.
        hadamard_block: width of the rotation along K, 0 for none.
        activation: name of the activation that it reads; linears of one name have equal multipliers.
        weight_dtype: of the weight that :meth:`dequantized` returns; a cast of the module changes it.
        weight_requires_grad: whether the weight that was packed required gradients.
        weight_codes: uint8 ``[N, ceil(K / 64) * 32]``.
        weight_scales: int32 ``[N, ceil(K / 64)]``.
        bias: ``[N]`` or None.
        multiplier: float32 ``[K]``, the channel mask times the rotation's signs, or None for ones.
        low_rank_a: ``[K, r]``, of a branch beside the product (:mod:`tahf4_compiler.format.low_rank`), or None. A cast
            of the module casts the branch.
        low_rank_b: ``[r, N]`` or None.
        activation_bits: of the activation, 4 (HiF4), 8 (int8) or 16 (not quantized; the weight is dequantized in each
            call). What the linear holds does not depend on it; see
            :func:`tahf4_compiler.set_activation_bits`.
        span: units of a row of the weight that share a level-1 scale, as those of an activation of 4 bits then do: 1, 2
            or 4, or 0 for all.
        rounding: of the activation's elements, see :func:`tahf4_compiler.hif4.quantize`.
        fused: what :mod:`tahf4_compiler.packed.fusing` keeps to take adapters out of the branch again, or None.
    """

    weight_codes: nn.Parameter
    weight_scales: nn.Parameter
    multiplier: nn.Parameter | None
    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None
    weight_requires_grad = False
    activation_bits = 4  # of one that was pickled by an earlier version, too
    span, rounding = 1, "half_away"
    fused: Any = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        hadamard_block: int = 0,
        multiplies: bool = False,
        activation: str = "",
        activation_bits: int = 4,
        rank: int = 0,
        span: int = 1,
        rounding: str = "half_away",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an empty linear, to be filled by ``load_state_dict``; :meth:`from_linear` packs one.

        Args:
            in_features: K.
            out_features: N.
            bias: whether there is one.
            hadamard_block: a power of two that divides K rounded up to a multiple of 64, or 0.
            multiplies: whether there is a multiplier.
            activation: name of the activation.
            activation_bits: 4, 8 or 16.
            rank: of the branch, 0 for none.
            span: units that share a level-1 scale; 0 for a row.
            rounding: see :class:`tahf4_compiler.Options`.
            device: of the parameters; ``"meta"`` for none.
            dtype: of the bias, of the branch, and of the dequantized weight.
        """
        nn.Module.__init__(self)
        units = hif4.units(in_features)
        dtype = dtype if dtype is not None else torch.get_default_dtype()
        form = joined(hif4.check_span(span), rounding)
        self._set(in_features, out_features, hadamard_block, activation, dtype, activation_bits, form)
        codes = torch.zeros(out_features, units * hif4.UNIT // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(out_features, units, dtype=torch.int32, device=device)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        ones = torch.ones(in_features, dtype=torch.float32, device=device) if multiplies else None
        branch = [
            torch.zeros(shape, dtype=dtype, device=device) if rank else None
            for shape in ((in_features, rank), (rank, out_features))
        ]
        self._hold(hif4.Packed(codes, scales, in_features), _parameter(zeros), ones, branch)
        for name, parameter in [*self._parameters.items()]:
            self.register_parameter(name, parameter)  # as a module does, for accelerate.init_empty_weights

    def _hold(
        self, packed: hif4.Packed, bias: nn.Parameter | None, multiplier: Tensor | None, branch: Sequence[Tensor | None]
    ) -> None:
        # Code that asks for the dtype of a model looks at its first parameter: one of that dtype if there is one.
        # Not by register_parameter: while any thread loads a model, accelerate's puts what it is given on meta.
        values = {
            "bias": bias,
            **{name: _parameter(factor) for name, factor in zip(BRANCH, branch, strict=True)},
            "multiplier": _parameter(multiplier),
            "weight_codes": _parameter(packed.codes),
            "weight_scales": _parameter(packed.scales),
        }
        self._parameters.update(values)

    def _set(
        self, k: int, n: int, block: int, activation: str, dtype: torch.dtype, bits: int = 4, span: int = 1
    ) -> None:
        int8.check_bits(bits)
        self.span, self.rounding = parted(span)
        self.in_features, self.out_features, self.activation_bits = k, n, bits
        self.hadamard_block, self.activation, self.weight_dtype = block, activation, dtype

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        packed: hif4.Packed,
        multiplier: Tensor | None = None,
        hadamard_block: int = 0,
        activation: str = "",
        low_rank: LowRank | None = None,
        span: int = 1,
    ) -> HiF4Linear:
        """Return a packed linear in the place of another: its bias, hooks and other attributes go over.

        Args:
            linear: its weight is not read.
            packed: ``[N, K]``, transformed by the inverse of the activation's transform.
            multiplier: float32 ``[K]`` or None.
            hadamard_block: as for the constructor.
            activation: name of the activation.
            low_rank: the branch beside the product, or None.
            span: a form (:mod:`tahf4_compiler.format.spans`): units that share a level-1 scale, and the rounding.

        Raises:
            FormatError: the packed weight is not of the linear's shape.
            PackedError: it does not hold the span.
        """
        n, k = linear.out_features, linear.in_features
        if tuple(packed.codes.shape) != (n, hif4.units(k) * hif4.UNIT // 2):
            raise FormatError(f"codes of shape {tuple(packed.codes.shape)} for a linear of {k} -> {n} features")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.__dict__.update(_carried(linear))
        require_span(packed.scales, units_of(span))
        self._set(k, n, hadamard_block, activation, linear.weight.dtype, span=span)
        self.weight_requires_grad = linear.weight.requires_grad
        place = multiplier.to(packed.codes.device, torch.float32) if multiplier is not None else None
        branch = [
            factor.to(packed.codes.device, linear.weight.dtype, copy=True) if factor is not None else None
            for factor in low_rank or (None, None)
        ]
        self._hold(packed, linear.bias, place, branch)
        return self

    @property
    def rank(self) -> int:
        """Rank of the branch, 0 for none."""
        branch = self._parameters.get("low_rank_b")
        return branch.shape[0] if branch is not None else 0

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., N]`` of the dtype of ``input`` (under autocast, of its dtype).

        Raises:
            GradientError: a gradient or a forward-mode derivative is asked for.
            FormatError: the input has another width, is nested or no floating-point tensor, or the multiplier was
                cast.
            RecipeError: the bits of the activation depend on the step, and nothing counts steps.
        """
        return self.product(input, self.bias)

    def product(self, input: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
        """Return the product with another bias, or in another dtype: a part of a sum over ranks has these.

        Args:
            input: ``[..., K]``.
            bias: ``[N]`` or None.
            out_dtype: of the result; None: as :meth:`forward`.

        Raises:
            GradientError, FormatError, RecipeError: as :meth:`forward`.
        """
        branch = (self._parameters.get(BRANCH[0]), self._parameters.get(BRANCH[1]))
        return self.product_with(
            input, self.weight_codes, self.weight_scales, self.multiplier, bias, [branch], out_dtype
        )

    def product_with(
        self,
        input: Tensor,
        codes: Tensor,
        scales: Tensor,
        multiplier: Tensor | None,
        bias: Tensor | None,
        branches: Sequence[tuple[Tensor | None, Tensor | None]],
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the product with what the linear holds, or with copies of it in another place.

        Args:
            input: ``[..., K]``.
            codes: as :attr:`weight_codes`.
            scales: as :attr:`weight_scales`.
            multiplier: as :attr:`multiplier`.
            bias: ``[N]`` or None.
            branches: ``[K, r]`` and ``[r, N]`` of each that runs beside the product; None for none.
            out_dtype: of the result; None: as :meth:`forward`.

        Raises:
            GradientError, FormatError, RecipeError: as :meth:`forward`.
        """
        bits, waits = self.activation_bits, False
        if by_step(self):
            waits = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(input, torch.fx.Proxy)
            bits = bits if waits else step_bits(self, "weight_codes", bits)
        out = packed_product(
            input, multiplier, self.hadamard_block, codes, scales, bias,
            k=self.in_features, out_dtype=out_dtype, bits=bits, span=joined(self.span, self.rounding), by_step=waits,
        )  # fmt: skip
        for a, b in branches:
            if a is not None and b is not None:
                # Plain products: with weights that are not transposed nobody takes them for linears.
                out = out + (input @ a.to(input.dtype) @ b.to(input.dtype)).to(out.dtype)
        return out

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the codes stand for, with the transform undone: ``[N, K]``.

        Args:
            dtype: of the result, by default :attr:`weight_dtype`.
        """
        k = self.in_features
        padded = hif4.units(k) * hif4.UNIT if self.hadamard_block else k
        weight = hif4.dequantize(hif4.Packed(self.weight_codes.detach(), self.weight_scales.detach(), padded))
        if self.hadamard_block:
            weight = hadamard(weight, self.hadamard_block)[:, :k]
        if self.multiplier is not None:
            weight = weight * self.multiplier.detach()
        a, b = (self._parameters.get(name) for name in BRANCH)
        if a is not None and b is not None:
            with torch.autocast(weight.device.type, enabled=False):
                weight = weight + (a.detach().to(torch.float32) @ b.detach().to(torch.float32)).t()
        return weight.to(dtype if dtype is not None else self.weight_dtype).contiguous()

    def to_linear(self) -> nn.Linear:
        """Return a plain linear in the place of this one, with the dequantized weight.

        It requires gradients as before it was packed, unless the model was frozen since, which the bias tells.
        """
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        own = {"hadamard_block", "activation", "weight_dtype", "weight_requires_grad", "activation_bits"}
        own |= {"span", "rounding", "fused"}
        linear.__dict__.update({key: value for key, value in _carried(self).items() if key not in own})
        gradients = self.weight_requires_grad and (self.bias is None or self.bias.requires_grad)
        linear._parameters["weight"] = nn.Parameter(self.dequantized(), requires_grad=gradients)
        linear._parameters["bias"] = self.bias
        return linear

    def extra_repr(self) -> str:
        """Return shape and transform."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"hadamard_block={self.hadamard_block}, multiplier={self.multiplier is not None}, "
            f"activation_bits={self.activation_bits}, rank={self.rank}, span={span_name(self.span)}, "
            f"rounding={self.rounding}"
        )

    @property
    def weight(self) -> Any:
        """A :class:`NoWeight`: shape, dtype and device of the weight, for libraries that ask."""
        make = no_weight if torch.compiler.is_compiling() else NoWeight
        return make(self.out_features, self.in_features, self.weight_dtype, self.weight_codes.device)

    @weight.setter
    def weight(self, value: Any) -> None:
        """Take back what the property gave, as peft does where it unloads an adapter.

        Raises:
            PackedError: it is anything else.
        """
        if not isinstance(value, NoWeight) or value.shape != (self.out_features, self.in_features):
            raise PackedError(
                "this linear is packed and takes no weight. Unpack it with tahf4.dequantize_, set its weight, and pack "
                "it again."
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter, as ``linear.name = parameter`` gives it.

        Raises:
            PackedError: it is a weight.
        """
        if name == "weight":
            type(self).weight.fset(self, param)  # type: ignore[attr-defined]
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks each module for what to compile in its place.

        Raises:
            PackedError: always.
        """
        raise PackedError(
            "torch.jit.script does not take packed linears: they choose their operator by what they are called with. "
            "Use torch.compile, torch.export.export, or torch.jit.trace(model.requires_grad_(False), inputs)."
        )

    def reset_parameters(self) -> None:
        """Do nothing: codes are not drawn at random."""

    def _apply(self, fn: Any, recurse: bool = True) -> HiF4Linear:
        """Move the parameters; what casts floating-point tensors leaves the multiplier in float32."""
        for dtype in (torch.uint8, torch.int32):
            if fn(torch.empty(0, dtype=dtype, device="cpu")).dtype != dtype:
                raise PackedError(
                    f"a cast would change the {dtype} of codes or scales, and with it the weight. Cast what is not "
                    "packed with model.to(dtype), which leaves integers as they are."
                )
        multiplier = self._parameters["multiplier"]
        self._parameters["multiplier"] = None  # and keeps its place
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["multiplier"] = multiplier
        if multiplier is not None:
            with torch.no_grad():
                # As integers, since a cast of a module passes those by.
                moved = fn(multiplier.detach().view(torch.int32)).view(torch.float32)
                if takes_data(multiplier, moved):
                    multiplier.data = moved
                else:
                    self._parameters["multiplier"] = _parameter(moved)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write down beside the tensors what they do not tell; torch keeps it in ``state_dict._metadata``."""
        check_saver(prefix[:-1])
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if compares_shapes():
            destination[f"{prefix}weight"] = self.weight
        if (metadata := getattr(destination, "_metadata", None)) is not None:
            metadata.setdefault(prefix[:-1], {}).update(self._transform())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        check_state(state_dict, prefix, local_metadata, self._transform(), self.span)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if (bias := self._parameters.get("bias")) is not None:  # assign=True brings its dtype
            self.weight_dtype = bias.dtype

    def _transform(self) -> dict[str, int | str]:
        """Return what the codes mean and how activations are rounded, which no tensor's shape tells."""
        return {"in_features": self.in_features, "hadamard_block": self.hadamard_block, "rounding": self.rounding}


def _carried(module: nn.Module) -> dict[str, Any]:
    """Return what goes over to the linear that takes a place: hooks, mode, sizes; no parameters, no ``forward``."""
    own = ("_parameters", "forward")
    return {k: v for k, v in module.__dict__.items() if k not in own and not k.startswith("_tahf4_")}


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return nn.Parameter(value, requires_grad=False) if value is not None else None
