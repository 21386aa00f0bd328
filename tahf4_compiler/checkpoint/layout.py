"""Where everything will stand in the files that are written: known before a value is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..files.reading import DTYPES, TensorInfo
from ..format import hif4
from ..packed.config import stand_ins
from ..packed.linear import BRANCH
from ..packed.transform import Transform
from ..pipeline.context import Decision
from .source import Component

__all__ = ["Item", "Shard", "shard", "shards_of"]

_ALIGNMENT = 8


@dataclass(frozen=True)
class Item:
    """Some tensors that are made together, in the order in which they are written.

    Attributes:
        outputs: name, dtype and shape of each.
        source: what they are made of, None for ``value``.
        dtype: that the source is cast to first.
        transform: how a weight is packed, None for a tensor that stays as it is.
        path: of the linear.
        value: what is written if there is no source.
        make: gives what is written, in pieces, in the place of the source's own bytes.
    """

    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    source: TensorInfo | None = None
    dtype: str = ""
    transform: Transform | None = None
    path: str = ""
    value: Tensor | None = field(default=None, repr=False, compare=False)
    make: Callable[[], Iterable[Tensor]] | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Bytes that are written."""
        return sum(_size(dtype, shape) for _, dtype, shape in self.outputs)


@dataclass(frozen=True)
class Shard:
    """A file of weights.

    Attributes:
        name: of the file, with its folder in the checkpoint.
        items: in the order in which they are written.
        header: of the file.
        read: bytes that are read for it.
    """

    name: str
    items: list[Item]
    header: bytes
    read: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(item.size for item in self.items)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].itemsize * math.prod(shape)


def shards_of(
    component: Component, plan: list[Decision], transforms: Mapping[str, Transform], limit: int
) -> tuple[list[Shard], dict[str, Any] | None]:
    """Lay out the files of a component.

    Args:
        component: see :class:`~.source.Component`.
        plan: of its model.
        transforms: of its linears in 4 bits.
        limit: bytes of a file; a single tensor may be larger.

    Returns:
        The files, and the content of the index, None for a single file (as diffusers writes it).
    """
    groups: list[list[Item]] = [[]]
    total = filled = 0
    for items in _items(component, transforms):
        size = sum(item.size for item in items)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1] += items
        filled, total = filled + size, total + size
    stem, prefix = "diffusion_pytorch_model", f"{component.name}/" if component.name else ""
    count = len(groups)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    shards = [shard(prefix + name, items) for name, items in zip(names, groups, strict=True)]
    if count == 1:
        return shards, None
    placed = zip(names, groups, strict=True)
    weight_map = {out[0]: name for name, items in placed for item in items for out in item.outputs}
    return shards, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _items(component: Component, transforms: Mapping[str, Transform]) -> Iterator[list[Item]]:
    """Yield what belongs together, in the order of the files that are read."""
    order = sorted(component.tensors.items(), key=lambda entry: (str(entry[1].path), entry[1].offset, entry[0]))
    for name, info in order:
        path, _, leaf = name.rpartition(".")
        dtype = component.dtypes[name]
        transform = transforms.get(path) if leaf == "weight" else None
        if transform is None:
            yield [Item(((name, dtype, info.shape),), info, dtype)]
            continue
        n, k = info.shape
        codes = (f"{path}.weight_codes", "U8", (n, hif4.units(k) * (hif4.UNIT // 2)))
        scales = (f"{path}.weight_scales", "I32", (n, hif4.units(k)))
        items = [Item((codes, scales), info, dtype, transform, path)]
        if (multiplier := transform.multiplier(k)) is not None:
            items.append(Item(((f"{path}.multiplier", "F32", (k,)),), value=multiplier))
        for leaf, factor in zip(BRANCH, transform.low_rank or (), strict=False):
            held = factor.to(DTYPES[dtype])
            items.append(Item(((f"{path}.{leaf}", dtype, tuple(held.shape)),), value=held))
        items += [Item(((mark, "U8", tuple(value.shape)),), value=value) for mark, value in stand_ins([path]).items()]
        yield items


def shard(name: str, items: list[Item]) -> Shard:
    """Return a file of items, ordered so that everything stands at a multiple of its element's size.

    Codes are whole multiples of 32 bytes and scales of 4, so they can follow each other and are written as they come.
    """

    def width(item: Item) -> int:
        return 3 if item.transform is not None else DTYPES[item.outputs[0][1]].itemsize

    ordered = sorted(items, key=lambda item: -width(item))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in ordered:
        for key, dtype, shape in item.outputs:
            end = at + _size(dtype, shape)
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    read = sum(item.source.size for item in items if item.source is not None)
    return Shard(name, ordered, len(text).to_bytes(8, "little") + text, read)
