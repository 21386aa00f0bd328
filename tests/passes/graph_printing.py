"""From a graph to its text."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from graph_words import WORDS, defined_names, normal, operator_of
from torch import fx

from tahf4_compiler.format.transforms import SEED
from tahf4_compiler.graph.inputs import BESIDE, INPUT, GraphInput, HeldWeight, PackedInput, PackedWeight
from tahf4_compiler.pipeline.rules import Role

if TYPE_CHECKING:
    from graph_reading import Text

CODES = ("codes", "scales")
"""The two inputs of a packed weight, which texts write as one."""


class Writer:
    def __init__(self, text: Text, comments: str, like: str) -> None:
        self.text_, self.comments = text, comments
        self.graph = text.graph_module.graph
        known = {n.name for n in self.graph.nodes} & (set(text.lines) | set(defined_names(like)))
        self.fresh = iter([name for name in defined_names(like) if name not in known])
        self.known = known
        self.names: dict[fx.Node, str] = {}
        self.stacks = "\n@" in f"\n{like}"

    def text(self) -> str:
        out: list[str] = []
        stack = ""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                out += self.placeholder(node)
            elif node.op == "output":
                if stack:
                    out.append("@")
                leaves = torch.utils._pytree.tree_leaves(node.args[0])
                out.append("return " + ", ".join(self.expression(leaf) for leaf in leaves))
            elif node not in self.names:
                modules = node.meta.get("nn_module_stack") or {}
                here = ", ".join(f"{path} {cls}" for path, cls in modules.values())
                if self.stacks and here != stack and not _is_part(node):
                    out.append(f"@ {here}".strip())
                    stack = here
                out += self.statement(node)
        return normal("\n".join(out).replace("@\nreturn", "return"))

    def name(self, node: fx.Node) -> str:
        if node not in self.names:
            self.names[node] = node.name if node.name in self.known else next(self.fresh, node.name)
        return self.names[node]

    def placeholder(self, node: fx.Node) -> list[str]:
        source = node.meta[INPUT]
        if isinstance(source, GraphInput):
            self.names[node] = node.name
            return [self.text_.lines[node.name]]
        weight = source.weight
        if isinstance(weight, HeldWeight):
            held = {n.meta[INPUT].index: n.name for n in self.graph.find_nodes(op="placeholder")
                    if isinstance(n.meta[INPUT], GraphInput)}  # fmt: skip
            (i,) = source.positions
            return [f"{self.name(node)}: held {source.part} of {held.get(i, self.text_.weights.get(i, str(i)))}"]
        name = self.weights(source)
        if source.part in BESIDE:
            how = f" {_how(weight)}".rstrip()
            return [f"{self.name(node)}: {source.part} of {name}{how}"]
        if source.part == "scales":
            return []
        inputs = [self.text_.context.inputs[i] for i in weight.weights]
        rows = "+".join(str(value.shape[0]) for value in inputs)
        dtype = "" if not weight.format else f" in {weight.format}"
        return [f"{name}: hif4[{rows}, {inputs[0].shape[1]}]{dtype} {_how(weight)}".rstrip()]

    def weights(self, source: PackedInput) -> str:
        return "+".join(self.text_.weights[i] for i in source.weights)

    def statement(self, node: fx.Node) -> list[str]:
        args: list[str] = []
        rest = list(node.args)
        while rest:
            value = rest.pop(0)
            source = value.meta.get(INPUT) if isinstance(value, fx.Node) else None
            if isinstance(source, PackedInput) and source.part in CODES and isinstance(source.weight, PackedWeight):
                other = rest[0].meta.get(INPUT) if rest and isinstance(rest[0], fx.Node) else None
                if source.part == "codes" and other == PackedInput("scales", source.weight):
                    args.append(self.weights(source))
                    rest.pop(0)
                    continue
            args.append(self.expression(value))
        args += [f"{key}={self.expression(value)}" for key, value in node.kwargs.items()]
        call = f"{_function(node)}({', '.join(args)})"
        value = node.meta.get("val")
        parts = [user for user in node.users if user.target is operator.getitem]
        whole = isinstance(value, list | tuple) and len(parts) == len(node.users)
        if whole and parts and len({user.args[1] for user in parts}) == len(parts):
            assert isinstance(value, list | tuple)
            by_index = {user.args[1]: user for user in parts}
            names = [self.name(by_index[i]) if i in by_index else "_" for i in range(len(value))]
            goal = ", ".join(names) + ("," if len(names) == 1 else "")
        else:
            goal = self.name(node)
        return [f"{goal} = {call}{self.comment(node)}"]

    def comment(self, node: fx.Node) -> str:
        found = node.meta.get(self.comments) if self.comments else None
        if found is None:
            return ""
        if isinstance(found, Role):
            return f"  # {'body' if found.body else 'boundary'}: {found.reason.removeprefix('boundary: ')}"
        if isinstance(found, tuple):
            return "".join(f"  # {decision.decision}: {decision.reason}" for decision in found)
        return f"  # {found}"

    def expression(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            source = value.meta.get(INPUT)
            if isinstance(source, PackedInput) and source.part in CODES and isinstance(source.weight, PackedWeight):
                return f"{self.weights(source)}.{source.part}"
            return self.name(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.expression(part) for part in value)}]"
        if isinstance(value, str):
            return '"' + value.replace("\n", "; ") + '"'
        if isinstance(value, torch.dtype | torch.memory_format | torch.layout | torch.device):
            return WORDS[value]
        return str(value)


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _function(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    space = "" if target.namespace == "aten" else f"{target.namespace}."
    name = f"{space}{target._opname}"
    return name if operator_of(name, ()) is target else f"{name}.{target._overloadname}"


def _how(weight: PackedWeight) -> str:
    words = ["masked"] if weight.masked else []
    if weight.seed is not None or weight.hadamard_block:
        words.append(f"rotated {weight.hadamard_block}" if weight.hadamard_block else "signs")
        if weight.seed != SEED:
            words.append("no signs" if weight.seed is None else f"seed {weight.seed}")
    if weight.search:
        words.append(f"searched by {weight.search}")
    if weight.rank:
        words.append(f"rank {weight.rank}")
    if weight.span != 1:
        words.append(f"span {weight.span}")
    return ", ".join(words)
