"""Draw what surrounds quantizations and products into them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..format.spans import units_of, with_units
from ..graph.inputs import DECISION
from ..graph.nodes import mutates, size_hint
from ..ops.program import call_of
from ..ops.registry import all_arguments, dispatch
from ..pipeline.activations import bits_of, call, form_of, span_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context
from .regions import MAX_INPUTS, Places, Region, erase, readers

aten = torch.ops.aten
QUANTIZE = torch.ops.tahf4.quantize.default
LINEAR = torch.ops.tahf4.linear.default
ATTENTIONS = {
    torch.ops.tahf4.attention.default: torch.ops.tahf4.attention_quantize.default,
    torch.ops.tahf4.fused_attention.default: torch.ops.tahf4.fused_attention_quantize.default,
}
"""An attention -> the same with the quantization of its result."""
_JOINS = (aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse norms, modulation and activations into quantizations, and bias, gates and residuals into products.

    Before::

        n = aten.layer_norm(x, [k], None, None, eps)
        m = aten.add(aten.mul(n, aten.add(scale, 1)), shift)
        codes, scales = tahf4.quantize(m, multiplier, 64)
        y = tahf4.linear(codes, scales, w_codes, w_scales, bias, dtype)
        z = aten.add(residual, aten.mul(y, gate))

    After (a program says in its text what the kernel computes)::

        codes, scales = tahf4.fused_quantize([x, scale, shift], "v0: float32 = layer_norm(x0, ...) ...", multiplier, 64)
        [z] = tahf4.fused_linear(codes, ..., [gate, residual], "v0: float32 = mul(y, x0) ...", dtype)

    Where branches of low rank read what is quantized (``aten.matmul(m, low_rank_a)``), their first product becomes a
    further result of the quantization::

        [codes, scales, xa] = tahf4.branched_quantize([x, scale, shift], "...", [low_rank_a], multiplier, 64)

    An attention in 8 bits whose heads, side by side, are what a quantization alone reads becomes
    ``tahf4.attention_quantize`` or ``fused_attention_quantize``, where each unit has a level-1 scale.

    A product whose only reader is a quantization becomes ``tahf4.linear_quantize``, which writes codes alone, and
    merged products with ``aten.split_with_sizes`` one with several results. Nothing is fused where only the reference
    could run it: PyTorch's own compiler does better there. Nothing is fused where another kernel than the fused one
    runs the parts: a plug-in's kernel keeps its nodes.

    Attributes:
        always: fuse for the reference as well, to look at the graph.
    """

    exact = True
    after = ("quantize", "share", "smooth", "rotate", "scale_search")
    before = ("lower",)
    always: bool = False

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        if context.options.kernels == "reference" and not self.always:
            context.note("nothing: reference kernels are asked for")
            return PassResult(graph_module, False)
        graph = graph_module.graph
        places = Places(graph)
        attentions = [node for node in graph.nodes if node.target in ATTENTIONS]
        kinds = ["products", "quantizations", "products with their quantization", "split products", "branches"]
        kinds += ["attentions with their quantization"] if attentions else []
        counts = dict.fromkeys(kinds, 0)
        for node in graph.find_nodes(op="call_function", target=LINEAR):
            kind = self._product(Region(places), node)
            if kind is not None:
                counts[kind] += 1
                context.matched(node)
        for node in attentions:
            if self._attention(Region(places), node):
                counts[kinds[-1]] += 1
                context.matched(node)
        for node in graph.find_nodes(op="call_function", target=QUANTIZE):
            if not _quantizes(node):
                continue
            branches = self._branched_quantization(Region(places), node)
            if branches or self._quantization(Region(places), node):
                counts["quantizations"] += 1
                counts["branches"] += branches
                context.matched(node)
        context.note(", ".join(f"{count} {kind}" for kind, count in counts.items()))
        return PassResult(graph_module, any(counts.values()))

    def _product(self, region: Region, product: fx.Node) -> str | None:
        sizes = _split(product)
        if sizes is not None:
            return self._split_product(region, product, sizes)
        program = region.following(product)
        end = region.end
        users = readers(end)
        # First what is most: the quantization of the result in the same kernel.
        alone = len(users) == 1 and _quantizes(users[0]) and users[0].args[0] is end and region.reaches(users[0])
        # A span of the result may be longer than what is known of a row at a time.
        if alone and units_of(form_of(users[0])) == 1:
            quantization = users[0]
            form = with_units(form_of(quantization), span_of(product))
            result = quantization.args[1:4]
            result = (*result[:2], bits_of(quantization), form) if form != 1 else result
            args = (*product.args[:6], region.leaves, str(program), *result)
            fused = self._replace(region, product, quantization, torch.ops.tahf4.linear_quantize.default, args)
            if fused is not None:
                region.absorbed.append(quantization)
                region.drop()
                return "products with their quantization"
        program = region.trimmed(program)
        if not program.statements:
            return None
        n = size_hint(product.meta["val"].shape[-1])
        dtype = region.end.meta["val"].dtype
        args = (*product.args[:6], [n], region.leaves, str(program), dtype, *product.args[6:])
        fused = self._replace(region, product, region.end, torch.ops.tahf4.fused_linear.default, args, first=True)
        if fused is None:
            return None
        region.drop()
        return "products"

    def _split_product(self, region: Region, product: fx.Node, sizes: list[int]) -> str | None:
        graph = product.graph
        (split,) = readers(product)
        if region.segment[split] != region.segment[product]:
            return None  # a write between them may change the bias
        dtype = product.meta["val"].dtype
        args = (*product.args[:6], sizes, [], "", dtype, *product.args[6:])
        fused = self._replace(region, product, split, torch.ops.tahf4.fused_linear.default, args)
        if fused is None:
            return None
        for part in list(fused.users):  # they are contiguous now
            users = list(part.users)
            # With another reader, one might write to what it copied.
            copied = len(users) == 1 and users[0].target is aten.clone.default
            if copied and users[0].kwargs.get("memory_format") is torch.contiguous_format:
                users[0].replace_all_uses_with(part)
                graph.erase_node(users[0])
        erase([split, product])
        return "split products"

    def _quantization(self, region: Region, quantization: fx.Node) -> bool:
        program = region.before(quantization)
        if not program.statements or len(region.leaves) > MAX_INPUTS:
            return False
        args = (region.leaves, str(program), *quantization.args[1:])
        fused = self._replace(region, quantization, quantization, torch.ops.tahf4.fused_quantize.default, args)
        if fused is None:
            return False
        region.absorbed.append(quantization)
        region.drop()
        return True

    def _branched_quantization(self, region: Region, quantization: fx.Node) -> int:
        """Compute the first products of branches with the quantization of what they read; return their number."""
        branches = region.branches(quantization)
        program = region.before(quantization, branches)
        if not branches or len(region.leaves) > MAX_INPUTS:
            return 0
        leaves = region.leaves if program.statements else [quantization.args[0]]
        with quantization.graph.inserting_before(quantization):
            factors = [region.moved(factor, quantization) for factor in branches.values()]
        args = (leaves, str(program), factors, *quantization.args[1:])
        fused = self._replace(region, quantization, quantization, torch.ops.tahf4.branched_quantize.default, args)
        if fused is None:
            erase(factors)
            return 0
        with quantization.graph.inserting_before(quantization):
            for i, product in enumerate(branches):
                part = call(product, operator.getitem, (fused, 2 + i))
                part.meta["val"] = product.meta["val"]
                product.replace_all_uses_with(part)
        region.absorbed += [quantization, *branches, *branches.values()]
        region.drop()
        return len(branches)

    def _attention(self, region: Region, attention: fx.Node) -> bool:
        """Quantize the result of an attention with it."""
        chain = _heads_side_by_side(attention)
        region.chain = [attention]
        if not chain or not region.reaches(chain[-1]):
            return False
        quantization = chain[-1]
        how = (*quantization.args[1:3], bits_of(quantization), form_of(quantization))
        args = (*all_arguments(attention), *how)
        target = ATTENTIONS[attention.target]  # type: ignore[index]
        if self._replace(region, attention, quantization, target, args) is None:
            return False
        region.absorbed = [attention, *chain]
        region.drop()
        return True

    def _replace(
        self, region: Region, like: fx.Node, end: fx.Node, target: Any, args: tuple[Any, ...], first: bool = False
    ) -> fx.Node | None:
        """Put a fused operator in the place of ``end`` if a kernel can run it; ``first``: its first result."""
        graph = end.graph
        with graph.inserting_before(end):
            node = call(like, target, args)
            if not self.always and not _same_kernel(node, {like, end}):
                graph.erase_node(node)
                return None
            if DECISION in like.meta:
                node.meta[DECISION] = like.meta[DECISION]
            result = node
            if first:
                result = call(end, operator.getitem, (node, 0))
                result.meta["val"] = end.meta["val"]
        end.replace_all_uses_with(result)
        return node


def _same_kernel(fused: fx.Node, parts: set[fx.Node]) -> bool:
    """Whether what runs the parts (a plug-in's kernel, say) also runs what they become; never the reference."""
    name = dispatch(fused.target, fused).name
    ours = [part for part in parts if part.target in (QUANTIZE, LINEAR, *ATTENTIONS)]
    return name != "reference" and all(dispatch(part.target, part).name == name for part in ours)


def _quantizes(node: fx.Node) -> bool:
    """Whether a node makes codes: an activation of 16 bits stays as it is, and its transform is an operator alone."""
    return node.target is QUANTIZE and bits_of(node) != 16


def _heads_side_by_side(attention: fx.Node) -> list[fx.Node]:
    """Return what stands between an attention and the quantization that alone reads its heads ``[B, L, H * Ev]``.

    The quantization is the last one; none where something else is done.
    """
    batch, heads, rows, channels = attention.meta["val"].shape
    wanted = [str(size) for size in (batch, rows, heads * channels)]
    node, chain = attention, list[fx.Node]()
    swapped = joined = False
    while len(users := readers(node)) == 1:
        user = users[0]
        chain.append(user)
        if _quantizes(user) and user.args[0] is node:
            return chain if joined else []
        found = call_of(user)
        copied = user.target in (aten.clone.default, aten.contiguous.default) or (found and found == ("to", (node,)))
        if not swapped and _swaps_heads_and_rows(user):
            swapped = True
        elif swapped and not joined and user.target in _JOINS and [str(n) for n in user.meta["val"].shape] == wanted:
            joined = True
        elif not copied or user.meta["val"].dtype != attention.meta["val"].dtype:
            break
        node = user
    return []


def _swaps_heads_and_rows(node: fx.Node) -> bool:
    if node.target is aten.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and {int(axis) % 4 for axis in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]


def _split(product: fx.Node) -> list[int] | None:
    """Return the columns of each part of a merged product, or None."""
    users = readers(product)
    if len(users) != 1 or users[0].target is not aten.split_with_sizes.default:
        return None
    sizes = users[0].args[1]
    whole = isinstance(sizes, list | tuple) and all(type(s) is int for s in sizes)
    axis = users[0].args[2] if len(users[0].args) > 2 else 0
    rank = product.meta["val"].dim()
    only_parts = all(user.target is operator.getitem for user in users[0].users)
    # Parts are views into rows; fused, they are contiguous. Who sees strides keeps them.
    seen = [user for part in users[0].users for user in part.users]
    only_parts = only_parts and not any(user.op == "output" for user in seen)
    # A copy of a view (`q.contiguous()`) would be the part itself, and a write to it one to the part.
    only_parts = only_parts and not any(_written_or_strided(part) for part in users[0].users)
    return list(sizes) if whole and axis in (-1, rank - 1) and only_parts else None  # type: ignore[arg-type]


def _written_or_strided(node: fx.Node) -> bool:
    """Whether something writes to a value or to what may share its memory, or reads that memory by strides."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if mutates(user) or user.target is aten.as_strided.default:
                return True
            schema = getattr(user.target, "_schema", None)
            shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
            if user not in seen and (shares or user.target in (operator.getitem, aten.type_as.default)):
                seen.add(user)
                waiting.append(user)
    return False
