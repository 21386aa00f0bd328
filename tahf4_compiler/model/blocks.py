"""The repeated blocks of a model: one set of rules, over facts that a graph or a tree of modules gives.

A graph knows which module reads what another wrote. A tree of modules knows sizes only, so there a module may follow
another if it reads as many features as the other writes. ``docs/concepts.md`` says which linears count.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from .linears import adapters, linear_weights, named_linears, packed_weights, plain_path, raw_matrices
from .parts import full_class_name

__all__ = [
    "MIN_LINEARS",
    "MIN_LINEARS_ALONE",
    "Member",
    "block_of",
    "container_paths",
    "in_container",
    "module_blocks",
    "repeated_blocks",
]

MIN_LINEARS = 2
"""Linears in each of several repeated blocks, at least."""

MIN_LINEARS_ALONE = 4
"""Linears in a block that is the only one of its container, at least."""
_MODULATIONS = 9
"""Scales, shifts and gates that a condition gives one block, at most."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Member:
    """A module that may be a block, as far as the rules ask.

    Attributes:
        cls: name of its class, with its module.
        shapes: ``[N, K]`` of the weights of the linears that it holds, at any depth, in order.
        structure: equal for modules that compute the same with other weights; None for a member of a container,
            whose place says it.
    """

    cls: str
    shapes: Sequence[tuple[int, int]]
    structure: Hashable

    @property
    def linears(self) -> int:
        """How many linears it holds."""
        return len(self.shapes)

    @property
    def size(self) -> int:
        """Values of their weights."""
        return sum(n * k for n, k in self.shapes)

    @property
    def reads(self) -> int:
        """Features that its first linear reads."""
        return _stream(self.shapes)[0][1]

    @property
    def writes(self) -> int:
        """Features that its last linear writes."""
        return _stream(self.shapes)[-1][0]

    @property
    def is_residual(self) -> bool:
        """Whether it can add what it writes to what it reads, though linears are declared in any order.

        Its last one may write what another reads, as in a gated MLP, or several scales and shifts.
        """
        d, n = self.reads, self.writes
        inner = n in {k for _, k in self.shapes} or (n % d == 0 and n <= _MODULATIONS * d)
        return n == d or (inner and d in {written for written, _ in self.shapes})


def repeated_blocks(
    members: Mapping[str, Member],
    follows: Callable[[str, str], bool],
    total: int,
    *,
    min_linears: int = MIN_LINEARS,
    min_linears_alone: int = MIN_LINEARS_ALONE,
) -> dict[str, str]:
    """Return ``module path -> class name`` of the outermost repeated blocks.

    Members of one container (``blocks.0``, ``blocks.1``, ...) of one class are blocks if each follows the one before or
    is followed by the next. Two of few linears are none that have all other blocks of their container between them, as
    an embedder and a head of one class have.
    Members of one container or attributes of one parent that are of one structure and hold nearly all weights are
    blocks, in whatever order they run: they are no boundary of anything.
    The only member of its class in a container is a block if it holds ``min_linears_alone`` linears, and either it
    holds half of the weights, or there are other blocks and it can add what it writes to what it reads.
    Towers are none, but the blocks inside of them: modules that hold half of their weights in blocks, and that stand
    side by side or bring their input to the width of these blocks, and their output to another.

    Args:
        members: by module path, in order.
        follows: whether the second module reads what the first writes.
        total: values of the weights of all linears of the model.
        min_linears: linears in each of several blocks, at least.
        min_linears_alone: linears in an only block, at least.
    """
    groups: dict[tuple[Hashable, ...], list[str]] = defaultdict(list)
    for path, member in members.items():
        if member.linears >= min_linears:
            groups[path.rpartition(".")[0], member.cls, member.structure].append(path)
    found: dict[str, str] = {}
    for (_, _, structure), paths in groups.items():
        for first, second in zip(paths, paths[1:], strict=False):
            if structure is None and follows(first, second):
                found |= {path: _short(members[path].cls) for path in (first, second)}
    few = [paths for paths in groups.values() if members[paths[0]].linears < min_linears_alone]
    ends = [path for paths in few if _are_ends(paths, found, list(members)) for path in paths]
    found = {path: cls for path, cls in found.items() if path not in ends}

    def is_tower(path: str) -> bool:
        return 2 * sum(members[p].size for p in _outermost(found, f"{path}.")) >= members[path].size

    def adapts_width(path: str) -> bool:
        widths = {members[p].reads for p in _outermost(found, f"{path}.")}
        return is_tower(path) and widths.isdisjoint((members[path].reads, members[path].writes))

    found = {path: cls for path, cls in found.items() if not adapts_width(path)}
    for paths in groups.values():
        if len(paths) > 1 and 4 * sum(members[p].size for p in paths) >= 3 * total and not any(map(is_tower, paths)):
            found |= {path: _short(members[path].cls) for path in paths}
    for path, member in members.items():
        # A model of one layer, or of one layer of a kind, has a container for it all the same.
        parent = path.rpartition(".")[0]
        if path in found or member.structure is not None or member.linears < min_linears_alone:
            continue
        beside = (o for p, o in members.items() if p != path and p.rpartition(".")[0] == parent)
        counts = (found and member.is_residual) or 2 * member.size >= total
        if counts and not any(other.cls == member.cls for other in beside) and not adapts_width(path):
            found[path] = _short(member.cls)
    return {path: found[path] for path in _outermost(found)}


def _linears_inside(model: nn.Module) -> dict[str, dict[str, tuple[int, int]]]:
    """Return for each module the linears that it holds at any depth, called or not: ``path below it -> [N, K]``."""
    modules = {plain_path(path): module for path, module in model.named_modules(remove_duplicate=False)}
    containers = container_paths(model)
    shapes: dict[str, tuple[int, int]] = {}  # of the weights, as [N, K]
    tables = {id(weight) for path, weight in linear_weights(model) if isinstance(modules.get(path), _TABLES)}
    for path, weight in linear_weights(model):
        if id(weight) not in tables:  # by whatever name: a head may be tied to a table
            shapes[path] = weight.shape[0], weight.shape[1]
    for path, codes in packed_weights(model):
        shapes[path] = codes.shape[0], getattr(modules.get(path), "in_features", 2 * codes.shape[1])
    for path, linear in named_linears(model):  # also those whose weight is no parameter of their own
        if id(linear._parameters.get("weight")) not in tables:
            shapes.setdefault(path, (linear.out_features, linear.in_features))
    for path in adapters(model):
        shapes.pop(path, None)
    members_of = [path for path in modules if in_container(path, containers)]
    lacking = [path for path in members_of if sum(f"{held}.".startswith(f"{path}.") for held in shapes) < MIN_LINEARS]
    for path, matrix in raw_matrices(model):
        if any(path.startswith(f"{member}.") for member in lacking):  # a block of too few modules of linears
            shapes[path] = matrix.shape[0], matrix.shape[1]
    order = {path: i for i, path in enumerate(modules)}
    shapes = dict(sorted(shapes.items(), key=lambda e: order.get(e[0], order.get(e[0].rpartition(".")[0], 0))))
    inside: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for path, shape in shapes.items():
        if 0 in shape:
            continue  # it computes nothing
        parts = path.split(".")
        for i in range(len(parts) + 1):
            above = ".".join(parts[:i])
            inside[above][path.removeprefix(above)] = shape
    return inside


def module_blocks(model: nn.Module) -> dict[str, str]:
    """Return ``module path -> class name`` of the outermost repeated blocks of a model, by its tree of modules."""
    modules = {plain_path(path): module for path, module in model.named_modules(remove_duplicate=False)}
    containers, inside = container_paths(model), _linears_inside(model)
    members: dict[str, Member] = {}
    for path, module in modules.items():
        if path and path in inside and path not in containers:
            structure = None if in_container(path, containers) else tuple(inside[path].items())
            members[path] = Member(full_class_name(module), [*inside[path].values()], structure)

    held: Counter[str] = Counter()  # values in each container, and in each module that is in none
    for path, member in members.items():
        if member.linears >= MIN_LINEARS:
            held[path if member.structure is not None else path.rpartition(".")[0]] += member.size

    @functools.cache
    def is_largest(container: str) -> bool:
        around = [name for name in held if not name or f"{container}.".startswith(f"{name}.")]
        return all(held[container] >= size for name, size in held.items() if name not in around)

    def follows(first: str, second: str) -> bool:
        written, read = (_stream(members[path].shapes) for path in (first, second))
        linears = min(len(written), len(read))
        few = MIN_LINEARS < linears < MIN_LINEARS_ALONE
        leads_out = any(all(n % k for _, k in written) for n, _ in written)  # read by none, not even in pieces
        if written[-1][0] == read[0][1] and not (few and leads_out):
            return True  # in the order of their declarations
        if linears <= MIN_LINEARS or {n for n, _ in written}.isdisjoint(k for _, k in read):
            return False
        # They fit in some order, as also heads do, of which only the last linear has another width. In a block such a
        # width is read in pieces, or spread (a gate, shared keys). It may be so in heads, but these hold less.
        (n, k), widths = written[-1], {k for _, k in written}
        read_on = all(k != other for other, _ in written) or any(n % width == 0 for width in widths)
        if not read_on and all(width % n for width in widths):
            return False
        return (read_on and linears >= MIN_LINEARS_ALONE) or is_largest(first.rpartition(".")[0])

    total = sum(n * k for n, k in inside[""].values()) if inside else 0
    return repeated_blocks(members, follows, total)


def _are_ends(paths: Sequence[str], blocks: Mapping[str, str], order: Sequence[str]) -> bool:
    """Whether two blocks have all others of their container between them, as an embedder and a head have."""
    if len(paths) != 2 or not blocks.keys() >= set(paths):
        return False
    container = "".join(paths[0].rpartition(".")[:2])
    others = [p for p in blocks if p.startswith(container) and not any(f"{p}.".startswith(f"{end}.") for end in paths)]
    first, last = (order.index(path) for path in paths)
    return bool(others) and all(first < order.index(path) < last for path in others)


def _stream(linears: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Return the linears ``[N, K]`` of a module but those that only read a condition, and scale or shift by it."""
    written, read = {n for n, _ in linears}, {k for _, k in linears}
    return [(n, k) for n, k in linears if k in written or n in read] or linears


def container_paths(model: nn.Module) -> set[str]:
    """Return the paths of the containers of a model."""
    modules = model.named_modules(remove_duplicate=False)
    return {plain_path(path) for path, module in modules if isinstance(module, _CONTAINERS)}


def in_container(path: str, containers: Set[str]) -> bool:
    """Return whether a module is a member of a container: by its number, or by any name in one of some containers."""
    parent, _, leaf = path.rpartition(".")
    return leaf.isdigit() or parent in containers


def block_of(path: str, blocks: Mapping[str, str]) -> tuple[str, str] | None:
    """Return path and class name of the block around a module path, or None."""
    return next(((block, cls) for block, cls in blocks.items() if path.startswith(f"{block}.")), None)


def _outermost(blocks: Mapping[str, str], inside: str = "") -> list[str]:
    """Return the blocks that are inside no other, of those inside a module: a block's attention layers may repeat."""
    paths = [path for path in blocks if path.startswith(inside)]
    return [path for path in paths if not any(path.startswith(f"{p}.") for p in paths)]


def _short(cls: str) -> str:
    return cls.rpartition(".")[2]
