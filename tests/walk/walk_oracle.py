"""What a model of a walk should hold and compute, kept beside it.

The oracle has its own copies of all tensors. Its numbers come from the reference operators in eager mode, one linear at
a time: no graph, no store of weights, no kernel and no packed module takes part.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from walk_networks import make

import tahf4_compiler as tahf4
from tahf4_compiler.format.transforms import SEED, multipliers
from tahf4_compiler.recipe.entries import RecipeEntry
from tahf4_compiler.recipe.recipe import Recipe
from tahf4_compiler.weights.packing import pack_transformed

__all__ = ["Held", "Oracle", "base", "linears"]


def base(module: nn.Module) -> nn.Module:
    """Return a linear without the adapter around it."""
    return module.base_layer if isinstance(module, BaseTunerLayer) else module


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return what stands in the place of each linear, by the path that it had in the beginning."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.Linear | BaseTunerLayer) and not inside:
            found[path] = module
    return found


@dataclass
class Packed:
    """A weight in HiF4."""

    codes: Tensor
    scales: Tensor
    multiplier: Tensor | None
    block: int

    def plain(self) -> Tensor:
        """Return the weight that the codes stand for, float32."""
        weight = torch.ops.tahf4.dequantize(self.codes, self.scales, self.scales.shape[1] * 64, torch.float32)
        if self.block:
            weight = tahf4.ops.transform(weight, None, self.block)
        return weight if self.multiplier is None else weight * self.multiplier


@dataclass
class Held:
    """What a linear holds."""

    path: str
    weight: Tensor
    """The plain weight; of a packed linear only its dtype and shape count."""
    bias: Tensor | None
    packed: Packed | None = None
    adapter: tuple[Tensor, Tensor, float] | None = None
    entry: RecipeEntry | None = None
    """What a recipe that was applied says."""

    def packed_now(self, entry: RecipeEntry | None) -> Packed:
        """Return the weight as it is packed."""
        k = self.weight.shape[1]
        if entry is None:
            mask, seed, block, search = None, SEED, 64, ""
        else:
            mask, seed, block, search = entry.mask, entry.seed, entry.hadamard_block, entry.search
        made = pack_transformed(self.weight, mask, seed, block, search)
        return Packed(made.codes, made.scales, multipliers(k, mask, seed)[0], block)


class Reference(nn.Module):
    """A linear by its definition."""

    def __init__(self, held: Held, oracle: Oracle) -> None:
        super().__init__()
        self.held, self.oracle = held, [oracle]  # a list: no module of this one
        self.dtype_of_all = nn.Parameter(held.weight.new_empty(0), requires_grad=False)  # for networks that ask for it

    @property
    def weight(self) -> Tensor:
        return self.held.weight

    def forward(self, x: Tensor) -> Tensor:
        held, (oracle,) = self.held, self.oracle
        packed = oracle.runs(held)
        if packed is None:
            y = nn.functional.linear(x, held.weight, held.bias)
        else:
            z = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
            codes, scales = torch.ops.tahf4.quantize(z, packed.multiplier, packed.block, oracle.bits(held))
            y = torch.ops.tahf4.linear(codes, scales, packed.codes, packed.scales, held.bias, z.dtype)
        if held.adapter is not None and oracle.adapted:
            first, second, scale = held.adapter
            z = x.to(first.dtype)
            y = (y + nn.functional.linear(nn.functional.linear(z, first), second) * scale).to(y.dtype)
        return y


@dataclass
class Oracle:
    """The model as it should be.

    Attributes:
        kind: of the network.
        network: it, with :class:`Reference` in the places of its linears.
        held: what each linear holds.
        adapted: whether the adapter acts.
        kept: paths that stay in high precision wherever they are compiled.
        compiled: whether plain linears of the body run in 4 bits.
        high: whether the denoising step at hand runs in high precision.
        attached_steps: whether the recipe that was applied to plain weights has such steps.
        packed_steps: whether the packed linears have.
    """

    kind: str
    network: nn.Module
    held: dict[str, Held] = field(default_factory=dict)
    adapted: bool = False
    kept: set[str] = field(default_factory=set)
    compiled: bool = False
    high: bool = False
    attached_steps: bool = False
    packed_steps: bool = False

    @classmethod
    def of(cls, kind: str, seed: int) -> Oracle:
        """Return the oracle of a new network."""
        self = cls(kind, make(kind, seed))
        for path, linear in list(linears(self.network).items()):
            bias = linear.bias.detach().clone() if linear.bias is not None else None
            self.held[path] = Held(path, linear.weight.detach().clone(), bias)
            parent, _, name = path.rpartition(".")
            setattr(self.network.get_submodule(parent), name, Reference(self.held[path], self))
        return self

    def plain(self) -> nn.Module:
        """Return the network with the plain weights, as a new one."""
        made = make(self.kind, 0)
        for path, linear in linears(made).items():
            linear.weight = nn.Parameter(self.held[path].weight, requires_grad=False)
        return made

    def body(self) -> list[str]:
        """Return the paths of the linears that the plan may put in 4 bits."""
        return [path for path in self.held if path.startswith("blocks.")]

    def is_packed(self) -> bool:
        """Whether a linear is packed."""
        return any(held.packed is not None for held in self.held.values())

    def runs(self, held: Held) -> Packed | None:
        """Return what a linear runs with in 4 bits, or None."""
        if held.packed is not None:
            return held.packed
        if not self.compiled or self.is_packed() or held.path not in self.chosen():
            return None
        return held.packed_now(held.entry)

    def chosen(self) -> list[str]:
        """Return what is packed now, or runs in 4 bits in a compiled graph."""
        return [path for path in self.body() if path not in self.kept and self._says(path, self.held[path].entry)]

    def _says(self, path: str, entry: RecipeEntry | None) -> bool:
        return _in_4_bits(path, entry) and not (self.high and entry is not None and self.attached_steps)

    def bits(self, held: Held) -> int:
        """Return the bits of the activation of a linear that runs with packed weights."""
        return 16 if held.packed is not None and self.packed_steps and self.high else 4

    def apply(self, recipe: Recipe | None) -> None:
        """Attach a recipe, or take it off."""
        self.attached_steps = recipe is not None and bool(recipe.high_precision_steps)
        if not self.is_packed():
            self.packed_steps = False
        for path, held in self.held.items():
            held.entry = _entry(recipe, path)

    def to_pack(self, recipe: Recipe | None, keep: Set[str] = frozenset()) -> dict[str, RecipeEntry | None]:
        """Return the paths that packing chooses, all but some, with what a recipe says about each."""
        if self.is_packed():  # what was left then is left now
            return {}
        said = {path: held.entry if recipe is None else _entry(recipe, path) for path, held in self.held.items()}
        return {p: said[p] for p in self.body() if p not in self.kept | keep and _in_4_bits(p, said[p])}

    def pack(self, recipe: Recipe | None, keep: Set[str] = frozenset(), part: bool = False) -> list[str]:
        """Pack all but some; return the paths. ``part``: of the body."""
        chosen = self.to_pack(recipe, keep)
        if not self.is_packed():
            inside = [held.entry for path, held in self.held.items() if not part or path in self.body()]
            attached = self.attached_steps and any(entry is not None for entry in inside)
            self.packed_steps = bool(recipe.high_precision_steps) if recipe is not None else attached
        for path, entry in chosen.items():
            held = self.held[path]
            held.packed, held.entry = held.packed_now(entry), None
        return [*chosen]

    def unpack(self) -> list[str]:
        """Dequantize; return the paths."""
        found = [path for path, held in self.held.items() if held.packed is not None]
        for path in found:
            held = self.held[path]
            assert held.packed is not None
            held.weight, held.packed = held.packed.plain().to(held.weight.dtype), None
        self.packed_steps = False
        return found

    def cast(self, dtype: torch.dtype, only: set[str] | None = None) -> None:
        """Cast all linears, or some, and with all of them what is no linear."""
        for path, held in self.held.items():
            if only is None or path in only:
                held.weight = held.weight.to(dtype)
                held.bias = held.bias.to(dtype) if held.bias is not None else None
                if held.adapter is not None:
                    first, second, scale = held.adapter
                    held.adapter = first.to(dtype), second.to(dtype), scale
        if only is None:
            nn.Module.to(self.network, dtype)

    def rows(self) -> int:
        """Return how many output features a call computes in 4 bits."""
        in_4_bits = (held for held in self.held.values() if self.runs(held) is not None and self.bits(held) == 4)
        return sum(len(held.weight) for held in in_4_bits)

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """Return the output of a call."""
        y = self.network(**given)
        return y if isinstance(y, Tensor) else y[0]

    def compare(self, model: nn.Module) -> None:
        """Hold a model's tensors, bit for bit, and its other parameters, against what they should be."""
        found = linears(model)
        assert list(found) == list(self.held), "linears were lost"
        for path, held in self.held.items():
            linear = base(found[path])
            assert isinstance(linear, tahf4.HiF4Linear) == (held.packed is not None), f"{path} is {type(linear)}"
            if held.packed is None:
                _same(f"{path}.weight", linear.weight, held.weight)
            else:
                assert linear.hadamard_block == held.packed.block, path
                assert linear.weight.dtype == held.weight.dtype, f"{path}.weight.dtype is {linear.weight.dtype}"
                assert tuple(linear.weight.shape) == tuple(held.weight.shape), path
                _same(f"{path}.weight_codes", linear.weight_codes, held.packed.codes)
                _same(f"{path}.weight_scales", linear.weight_scales, held.packed.scales)
                _same(f"{path}.multiplier", linear.multiplier, held.packed.multiplier)
            _same(f"{path}.bias", linear.bias, held.bias)
        mine = {n: p for n, p in self.network.named_parameters() if not n.endswith(".dtype_of_all")}
        others = {name: value for name, value in model.named_parameters() if name in mine}
        assert set(others) == set(mine), "parameters were lost"
        for name, value in mine.items():
            _same(name, others[name], value)
        state, known = set(model.state_dict()), {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert known <= state, f"state_dict lacks {sorted(known - state)[:3]}"


def _in_4_bits(path: str, entry: RecipeEntry | None) -> bool:
    return entry is None or entry.linears[path].decision == "hif4"


def _entry(recipe: Recipe | None, path: str) -> RecipeEntry | None:
    entries = recipe.experts[""].values() if recipe is not None else ()
    return next((entry for entry in entries if path in entry.linears), None)


def _same(name: str, got: Tensor | None, want: Tensor | None) -> None:
    if want is None or got is None:
        assert got is want, f"{name}: one is None"
        return
    assert got.dtype == want.dtype, f"{name} is of {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{name} has the shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.equal(got.detach(), want.detach()), f"{name} has other values"
