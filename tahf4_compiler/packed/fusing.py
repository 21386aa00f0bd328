"""``fuse_lora`` on packed linears: peft's LoRA becomes a part of the branch of low rank.

A packed linear has no weight that ``scale * up @ down`` could be added to. Its branch ``(x A) B`` takes the factors:
``scale * down^T`` are further columns of A, and ``up^T`` further rows of B. To unfuse is to leave these out again, so
everything else keeps its bytes. peft's own methods come here for packed linears, and go their way for all others.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, PackedError
from ..import_hook import when_imported
from ..model.offloading import offloader
from .guards import ask_before
from .linear import BRANCH, HiF4Linear

__all__ = ["register"]


@dataclass
class _Part:
    """What an adapter added: the last columns of A and rows of B but for those of later adapters, and to the bias."""

    adapter: str
    rank: int
    bias: Tensor | None


@dataclass
class _Fused:
    """What is fused into a linear and can be taken out again, and the bias without it if an adapter has one."""

    bias: Tensor | None = None
    parts: list[_Part] = field(default_factory=list)


def register() -> None:
    """Fuse into packed linears from now on, and check a whole model before the first is changed."""
    when_imported("peft.tuners.lora.layer", _take_over)
    when_imported("peft.tuners.tuners_utils", _ask_before_peft)
    when_imported("peft.tuners.mixed.model", _ask_before_mixed)
    when_imported("diffusers.loaders.peft", _ask_before_models)
    when_imported("diffusers.loaders.lora_base", _ask_before_pipelines)


def _take_over() -> None:
    from peft.tuners.lora.layer import Linear

    for name, ours in (("merge", _fuse), ("unmerge", _unfuse)):
        setattr(Linear, name, _where_packed(getattr(Linear, name), ours))


def _where_packed(theirs: Callable[..., None], ours: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        (ours if isinstance(self.get_base_layer(), HiF4Linear) else theirs)(self, *args, **kwargs)

    return method


def _ask_before_peft() -> None:
    from peft.tuners.tuners_utils import BaseTuner

    def merges(tuner: Any, adapter_names: Any = None, safe_merge: bool = False) -> None:
        _check([tuner.model], adapter_names, safe_merge)

    ask_before(BaseTuner, "merge_adapter", merges)
    ask_before(BaseTuner, "_unload_and_optionally_merge", _unloads)
    ask_before(BaseTuner, "unmerge_adapter", lambda tuner: _check_unfusing([tuner.model]))


def _ask_before_mixed() -> None:
    from peft.tuners.mixed.model import MixedModel

    ask_before(MixedModel, "_unload_and_optionally_merge", _unloads)


def _unloads(
    tuner: Any, merge: bool = True, _: bool = False, safe_merge: bool = False, adapter_names: Any = None, **kwargs: Any
) -> None:
    if merge:
        _check([tuner.model], adapter_names, safe_merge)


def _ask_before_models() -> None:
    from diffusers.loaders.peft import PeftAdapterMixin

    def fuses(model: Any, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None) -> None:
        _check([model], adapter_names, safe_fusing)

    ask_before(PeftAdapterMixin, "fuse_lora", fuses)
    ask_before(PeftAdapterMixin, "unfuse_lora", lambda model: _check_unfusing([model]))


def _ask_before_pipelines() -> None:
    from diffusers.loaders.lora_base import LoraBaseMixin

    def named(pipe: Any, components: Iterable[str] | None) -> list[nn.Module]:
        models = (getattr(pipe, name, None) for name in components or ())
        return [model for model in models if isinstance(model, nn.Module)]

    def fuses(
        pipe: Any, components: Any = (), _: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        _check(named(pipe, components), adapter_names, safe_fusing)

    def unfuses(pipe: Any, components: Any = (), **kwargs: Any) -> None:
        _check_unfusing(named(pipe, components))

    ask_before(LoraBaseMixin, "fuse_lora", fuses)
    ask_before(LoraBaseMixin, "unfuse_lora", unfuses)


def _wrapped(models: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Return the layers of peft in some models, each with its model and path, if one of them stands around HiF4."""
    if sys.modules.get("peft") is None:  # nothing has adapters; diffusers says what is missing
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(m, path, layer) for m in models for path, layer in m.named_modules() if isinstance(layer, BaseTunerLayer)]
    return found if any(isinstance(layer.get_base_layer(), HiF4Linear) for _, _, layer in found) else []


def _check(models: Iterable[nn.Module], adapter_names: list[str] | None, safe: bool) -> None:
    """Raise :class:`PackedError` if an adapter cannot be fused into a packed linear of some models."""
    for model, path, wrapper in _wrapped(models):
        if isinstance(wrapper.get_base_layer(), HiF4Linear):
            _check_one(wrapper, adapter_names, safe, path)
            if _chosen(wrapper, adapter_names) and (outer := offloader(model, f"{path}.base_layer")) is not None:
                raise PackedError(
                    f"{path} is offloaded by {outer or 'the whole model'}, which would not move a branch that is "
                    "made now. Fuse the adapter first and enable offloading afterwards."
                )
        elif safe:
            _check_finite(wrapper, adapter_names, path)


def _check_unfusing(models: Iterable[nn.Module]) -> None:
    """Raise :class:`PackedError` if an adapter cannot be taken out of a packed linear of some models."""
    for model, path, wrapper in _wrapped(models):
        if isinstance(wrapper.get_base_layer(), HiF4Linear) and wrapper.merged_adapters:
            if (outer := offloader(model, f"{path}.base_layer")) is not None:
                raise PackedError(
                    f"{path} is offloaded by {outer or 'the whole model'}, and its branch is not in memory. Take the "
                    "offloading off, unfuse the adapter, and enable offloading again."
                )
            _check_whole(wrapper.get_base_layer(), path)


def _check_whole(linear: HiF4Linear, path: str = "a linear") -> None:
    """Raise for a linear whose bias has an adapter and is not in memory, or a part."""
    bias = linear._parameters.get("bias")
    held = [linear._parameters.get(leaf) for leaf in BRANCH]
    parted = False
    if linear.fused is not None and linear.fused.bias is not None and bias is not None:
        parted = type(bias) is not nn.Parameter or bias.shape != linear.fused.bias.shape
    if parted or any(value is not None and value.is_meta for value in (bias, *held)):
        raise PackedError(
            f"{path} is offloaded or divided among ranks, and what is fused into it cannot be taken out. Unfuse the "
            "adapter first, and offload or divide the model afterwards."
        )


def _check_finite(wrapper: Any, adapter_names: list[str] | None, path: str) -> None:
    """Raise :class:`FormatError`, with peft's words, if an adapter holds NaN or infinities."""
    for name in _chosen(wrapper, adapter_names):
        layers = (getattr(wrapper, attribute) for attribute in wrapper.adapter_layer_names)
        held = [each[name] for each in layers if name in each]
        values = [v for each in held for v in (each.parameters() if isinstance(each, nn.Module) else (each,))]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise FormatError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken ({path}); nothing was "
                "fused"
            )


def _chosen(wrapper: Any, adapter_names: list[str] | None) -> list[str]:
    """Return the adapters of a layer of peft that are to be fused and are not fused yet."""
    held = {name for attribute in wrapper.adapter_layer_names for name in getattr(wrapper, attribute, ())}
    names = wrapper.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in held and name not in wrapper.merged_adapters]


def _check_one(wrapper: Any, adapter_names: list[str] | None, safe: bool, path: str = "a linear") -> None:
    """Raise for a layer of peft around a packed linear.

    Raises:
        PackedError: an adapter is no plain LoRA, or too large, or the linear cannot take it.
        FormatError: NaN or infinities are to be refused, and an adapter has some.
    """
    for name in _chosen(wrapper, adapter_names):
        if (obstacle := _obstacle(wrapper, name)) is not None:
            raise PackedError(
                f"adapter {name!r} cannot be fused into {path}, which is packed: {obstacle}. It runs beside the 4-bit "
                "product as long as it is not fused. To fuse it, load the original, fuse, and pack."
            )
    if safe:
        _check_finite(wrapper, adapter_names, path)


def _obstacle(wrapper: Any, name: str) -> str | None:
    """Return why an adapter cannot be fused into a packed linear, or None."""
    from peft.tuners import lora

    linear, kind = wrapper.get_base_layer(), type(wrapper)
    if not issubclass(kind, lora.Linear):
        return f"it is a {kind.__module__}.{kind.__name__}, and a branch of low rank takes a plain LoRA alone"
    if (variant := wrapper.lora_variant.get(name)) is not None:
        return f"it is a {type(variant).__name__}, and a branch of low rank takes a plain LoRA alone"
    k, n, rank = linear.in_features, linear.out_features, wrapper.lora_A[name].weight.shape[0]
    if rank > min(k, n):
        return f"its rank is {rank}, more than the smaller side of a weight of {k} -> {n} features"
    if wrapper.lora_bias[name] and linear._parameters.get("bias") is None:
        return "it has a bias (lora_bias), and the linear has none that is a parameter"
    if linear.weight_dtype.itemsize == 1:
        return f"the linear is stored in {linear.weight_dtype} (enable_layerwise_casting), which would round it"
    whole = wrapper.lora_A[name].weight.shape[1] == k and wrapper.lora_B[name].weight.shape[0] == n
    if not whole or linear.weight_codes.is_meta or type(linear.weight_codes) is not nn.Parameter:
        return "the linear is offloaded or divided among ranks, which can follow but not come before"
    return None


def _factors(wrapper: Any, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what an adapter adds to A, to B and to the bias of a packed linear."""
    linear, scale = wrapper.get_base_layer(), wrapper.scaling[name]
    held = linear._parameters.get(BRANCH[0])
    dtype = held.dtype if held is not None else linear.weight_dtype
    place = {"device": linear.weight_codes.device, "dtype": dtype}
    down, up = wrapper.lora_A[name].weight.detach(), wrapper.lora_B[name]
    wide = torch.promote_types(down.dtype, torch.float32)
    bias = up.bias.detach().to(wide) * scale if wrapper.lora_bias[name] else None
    return (down.to(wide) * scale).t().to(**place), up.weight.detach().t().to(**place), bias


def _fuse(wrapper: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Do what peft's ``Linear.merge`` does, on a packed linear.

    Raises:
        PackedError, FormatError: as :func:`_check_one`; nothing is changed then.
    """
    from peft.tuners.tuners_utils import check_adapters_to_merge

    linear: HiF4Linear = wrapper.get_base_layer()
    names = check_adapters_to_merge(wrapper, adapter_names)
    _check_one(wrapper, names, safe_merge)
    if not wrapper.merged_adapters:  # an adapter that was unloaded since stays for good
        linear.fused = _Fused()
    for name in _chosen(wrapper, names):
        a, b, more = _factors(wrapper, name)
        held = [linear._parameters.get(leaf) for leaf in BRANCH]
        if held[0] is not None and held[1] is not None:
            a, b = torch.cat([held[0].detach(), a], 1), torch.cat([held[1].detach(), b])
        _hold(linear, a, b)
        linear.fused.parts.append(_Part(name, wrapper.lora_A[name].weight.shape[0], more))
        if more is not None:
            if linear.fused.bias is None:
                linear.fused.bias = linear.bias.detach().clone()
            _add_up(linear, linear.fused)
        wrapper.merged_adapters.append(name)


def _unfuse(wrapper: Any) -> None:
    """Do what peft's ``Linear.unmerge`` does, on a packed linear; an adapter that was deleted stays, as there.

    Raises:
        PackedError: the linear is offloaded or divided; nothing is changed then.
    """
    if not wrapper.merged_adapters:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    linear: HiF4Linear = wrapper.get_base_layer()
    _check_whole(linear)
    fused, factors = linear.fused, [linear.get_parameter(leaf).detach() for leaf in BRANCH]
    ranks = [part.rank for part in fused.parts]
    sizes = [linear.rank - sum(ranks), *ranks]
    stay = [part.adapter not in wrapper.lora_A for part in fused.parts]
    a, b = (factor.split(sizes, axis) for factor, axis in zip(factors, (1, 0), strict=True))
    _hold(linear, torch.cat([*compress(a, [True, *stay])], 1), torch.cat([*compress(b, [True, *stay])]))
    fused.parts = [*compress(fused.parts, stay)]
    if fused.bias is not None:
        _add_up(linear, fused)
    linear.fused = None
    wrapper.merged_adapters.clear()


def _hold(linear: HiF4Linear, a: Tensor, b: Tensor) -> None:
    """Give a linear another branch; compiled code notices the other shape."""
    for leaf, factor in zip(BRANCH, (a, b), strict=True):
        value = nn.Parameter(factor.contiguous(), requires_grad=False) if len(b) else None
        linear._parameters[leaf] = value


def _add_up(linear: HiF4Linear, fused: _Fused) -> None:
    """Give a linear the bias that it has with what is fused; without, the bytes of before."""
    assert fused.bias is not None
    bias = linear.bias.detach()
    value = fused.bias.to(bias.device)
    for part in fused.parts:
        value = value + part.bias.to(bias.device) if part.bias is not None else value
    bias.copy_(value)
