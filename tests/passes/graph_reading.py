"""From a text to a graph with fake values, as a capture gives it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graph_printing import Writer
from graph_words import CONSTANTS, DTYPES, SIZES, divided, operator_of, statements
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tahf4_compiler.format.transforms import SEED
from tahf4_compiler.graph.inputs import DECISION, INPUT, ROLE, GraphInput, PackedInput, PackedWeight
from tahf4_compiler.model.attachments import _KEPT, _RECIPE, Attachment, attach
from tahf4_compiler.model.reasons import Cause, Reason
from tahf4_compiler.model.tree import Surroundings
from tahf4_compiler.options import Options
from tahf4_compiler.pipeline.context import Context, Decision
from tahf4_compiler.pipeline.rules import Role
from tahf4_compiler.pipeline.shapes import propagate

_CAUSES = {
    "body": Cause.BODY, "boundary": Cause.BOUNDARY, "kept": Cause.KEPT, "sensitivity": Cause.SENSITIVITY,
    "this step runs in high precision": Cause.STEP,
}  # fmt: skip
"""What the words before a reason's colon stand for."""

_INPUT = re.compile(
    r"(?P<name>[\w+]+): (?:(?P<kind>param|buffer|const|hif4)\.?)?(?P<dtype>[a-z]+\d+|bool)?\[(?P<shape>[^\]]*)\]"
    r"(?: strides (?P<strides>[\d, ]+))?(?P<meta> on meta)?(?: (?P<how>[a-z][^=]*?))?(?: = \"(?P<path>[^\"]*)\")?"
)
_PART = re.compile(
    r"(?P<name>\w+): (?P<part>multiplier|observer|low_rank_[ab]) of (?P<weights>[\w+]+)(?: (?P<how>.+))?"
)


@dataclass
class Text:
    """A graph that was read from a text, and what it belongs to.

    Attributes:
        graph_module: with fake values, as a capture gives it.
        context: with values for its inputs.
        root: owns the parameters.
        lines: how each input was written.
        weights: name of each parameter by its position.
    """

    graph_module: fx.GraphModule
    context: Context
    root: nn.Module
    lines: dict[str, str] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        recipe: Mapping[str, Attachment] | None = None,
        kept: Mapping[str, Attachment] | None = None,
        blocks: Mapping[str, dict[str, str]] | None = None,
        values: Mapping[str, Tensor] | None = None,
        tied: Mapping[int, int] | None = None,
        **options: Any,
    ) -> Text:
        """Read a text.

        Args:
            text: as described above.
            recipe: what a recipe says about weights, by module path.
            kept: what ``tahf4.keep`` attached, by module path.
            blocks: repeated containers of the module that the graph is a part of.
            values: of inputs, by name; others are random.
            tied: for the multipliers of packed linears, by position: that of the first one that is equal.
            options: of the compilation.
        """
        made = Reader(text, values or {}).text(recipe or {}, kept or {}, blocks or {}, Options.parse(options))
        made.context.tied.update(tied or {})
        return made

    def shown(self, comments: str = "", like: str = "") -> str:
        """Return the graph as text.

        Args:
            comments: key in ``node.meta`` of what is printed behind operators.
            like: a text whose names those nodes take that this text did not have, in order.
        """
        return Writer(self, comments, like).text()


class Reader:
    def __init__(self, text: str, values: Mapping[str, Tensor]) -> None:
        torch.manual_seed(0)
        self.given = values
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.fake_mode = FakeTensorMode(shape_env=ShapeEnv())
        self.values: list[Any] = []
        self.nodes: dict[str, fx.Node] = {}
        self.packed: dict[str, tuple[fx.Node, fx.Node]] = {}
        self.lines: dict[str, str] = {}
        self.weights: dict[int, str] = {}
        self.paths: dict[str, str] = {}
        self.stack: dict[str, tuple[str, str]] = {}
        for line in statements(text):
            self.read(*divided(line))

    def text(
        self,
        recipe: Mapping[str, Attachment],
        kept: Mapping[str, Attachment],
        blocks: Mapping[str, dict[str, str]],
        options: Options,
    ) -> Text:
        surroundings = Surroundings(self.root)
        surroundings.blocks = {path: cls for members in blocks.values() for path, cls in members.items()}
        surroundings.classes = {}  # only names: the modules that a text's line stands in are those of its "@"
        attach(self.root, recipe, _RECIPE)
        attach(self.root, kept, _KEPT)
        context = Context(options, tuple(self.values), surroundings, self.fake_mode)
        context.paths.update({i: self.paths[name].removesuffix(".weight") for i, name in self.weights.items()})
        graph_module = fx.GraphModule(nn.Module(), self.graph)
        propagate(graph_module, context, "text")
        return Text(graph_module, context, self.root, self.lines, self.weights)

    def read(self, line: str, comment: str) -> None:
        if line.startswith("@"):
            modules = [part.split() for part in line[1:].split(",") if part.strip()]
            self.stack = {path: (path, cls) for path, cls in modules}
        elif line.startswith("return"):
            found = self.value(line.removeprefix("return").strip() or "()")
            self.graph.output(tuple(found) if isinstance(found, list | tuple) else (found,))
        elif (match := _PART.fullmatch(line)) is not None:
            names = match["weights"].split("+")
            weight = _weight(tuple(self.position(n) for n in names), match["how"] or "")
            self.placeholder(match["name"], PackedInput(match["part"], weight), line)
        elif (match := _INPUT.fullmatch(line)) is not None:
            self.input(match, line)
        else:
            self.call(line, comment)

    def position(self, name: str) -> int:
        return next(i for i, known in self.weights.items() if known == name)

    def placeholder(self, name: str, source: Any, line: str, fake: Tensor | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        assert node.name == name, f"{name} is a name that torch.fx changes; take another"
        node.meta[INPUT] = source
        if fake is not None:
            node.meta["val"] = fake
        self.nodes[name] = node
        self.lines[name] = line
        return node

    def input(self, match: re.Match[str], line: str) -> None:
        name, kind = match["name"], match["kind"] or "user"
        sizes = [part.strip() for part in match["shape"].split(",") if part.strip()]
        if kind == "hif4":
            rows, k = sizes[0].split("+"), int(sizes[1])
            names = name.split("+")
            for part, count in zip(names, rows, strict=True):
                if part not in self.weights.values():
                    self.parameter(part, match["path"], torch.randn(int(count), k))
            weight = _weight(tuple(self.position(part) for part in names), match["how"] or "")
            plain = name.replace("+", "_")
            nodes = [self.placeholder(f"{plain}_{p}", PackedInput(p, weight), line) for p in ("codes", "scales")]
            for node in nodes:
                del self.nodes[node.name], self.lines[node.name]
            self.packed[name] = (nodes[0], nodes[1])
            self.lines[name] = line
            return
        shape = [SIZES[s] if s in SIZES else int(s) for s in sizes]
        value = self.given[name] if name in self.given else _random(shape, match)
        dynamic = [DimDynamic.DYNAMIC if s in SIZES else DimDynamic.STATIC for s in sizes]
        if kind == "param":
            path = match["path"] or (f"{name}.weight" if len(shape) == 2 else name)
            index = self.parameter(name, path, value)
            fake = self.fake_mode.from_tensor(self.values[index], static_shapes=True)
        else:
            path, index = match["path"] or name, len(self.values)
            self.values.append(value)
            symbolic = StatelessSymbolicContext(dynamic_sizes=dynamic)
            fake = self.fake_mode.from_tensor(value, symbolic_context=symbolic)
        kinds = {"param": "parameter", "const": "constant"}
        self.placeholder(name, GraphInput(kinds.get(kind, kind), path, index), line, fake)  # type: ignore[arg-type]

    def parameter(self, name: str, path: str | None, value: Tensor) -> int:
        self.paths[name] = path or f"{name}.weight"
        *parents, leaf = self.paths[name].split(".")
        owner = self.root
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        parameter = value if type(value) is not Tensor else nn.Parameter(value, requires_grad=False)
        owner.register_parameter(leaf, parameter)  # type: ignore[arg-type]
        index = len(self.values)
        self.values.append(parameter)
        self.weights[index] = name
        return index

    def call(self, line: str, comment: str) -> None:
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call), f"no statement: {line}"
        (goal,) = statement.targets
        function = ast.unparse(statement.value.func)
        args = [part for a in statement.value.args for part in self.argument(a, function)]
        kwargs = {k.arg: self.evaluate(k.value) for k in statement.value.keywords if k.arg is not None}
        target = operator_of(function, args)
        assert target is not None, f"{function} needs the name of its overload"
        several = isinstance(goal, ast.Tuple)
        names = [ast.unparse(n) for n in goal.elts] if isinstance(goal, ast.Tuple) else [ast.unparse(goal)]
        node = self.graph.create_node(
            "call_function", target, tuple(args), kwargs, name="_".join(names) + "_all" if several else names[0]
        )
        if self.stack:
            node.meta["nn_module_stack"] = dict(self.stack)
        self.annotate(node, comment)
        for i, name in enumerate(names):
            if several and name != "_":
                self.nodes[name] = self.graph.create_node("call_function", operator.getitem, (node, i), name=name)
            elif not several:
                self.nodes[name] = node
            assert name == "_" or self.nodes[name].name == name, f"{name} is a name that torch.fx changes"

    def annotate(self, node: fx.Node, comment: str) -> None:
        word, _, reason = comment.partition(": ")
        if word in ("body", "boundary"):
            node.meta[ROLE] = Role(word == "body", Reason(_CAUSES.get(word, Cause.OTHER), reason))
        elif word or node.target is torch.ops.tahf4.linear.default:
            first = next((start for start in _CAUSES if reason.startswith(start)), "")
            why = Reason(_CAUSES.get(first, Cause.OTHER), reason)
            decision = Decision(node.name, 0, 0, word or "hif4", why, 0, 0, node=node.name)
            if word and len(node.args) > 1 and isinstance(held := node.args[1], fx.Node) and INPUT in held.meta:
                decision.weight_index = held.meta[INPUT].index
            node.meta[DECISION] = (decision,)
            node.meta[ROLE] = Role(first != "boundary", why)

    def argument(self, expression: ast.expr, function: str) -> list[Any]:
        name = ast.unparse(expression).replace(" ", "")
        if name in self.packed and (function.startswith("tahf4.") or name not in self.nodes):
            return list(self.packed[name])
        return [self.evaluate(expression)]

    def value(self, text: str) -> Any:
        return self.evaluate(ast.parse(text, mode="eval").body)

    def evaluate(self, expression: ast.expr) -> Any:
        if isinstance(expression, ast.Name):
            found = self.nodes.get(expression.id, CONSTANTS.get(expression.id))
            assert found is not None, f"{expression.id} is not defined"
            return found
        if isinstance(expression, ast.List | ast.Tuple):
            return [self.evaluate(part) for part in expression.elts]
        return ast.literal_eval(expression)


def _random(shape: Sequence[int], match: re.Match[str]) -> Tensor:
    dtype = DTYPES[match["dtype"] or "f32"]
    device = "meta" if match["meta"] else "cpu"
    value = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)
    value = value.to(device)
    if match["strides"]:
        strides = [int(part) for part in match["strides"].split(",")]
        value = torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(value)
    return value


def _weight(weights: tuple[int, ...], how: str) -> PackedWeight:
    found: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in how.split(","))):
        if part == "masked":
            found["masked"] = True
        elif match := re.fullmatch(r"rotated (\d+)|signs", part):
            found["seed"] = SEED
            found["hadamard_block"] = int(match[1] or 0)
        elif match := re.fullmatch(r"seed (\d+)|no signs", part):
            found["seed"] = int(match[1]) if match[1] else None
        elif match := re.fullmatch(r"searched by (\w+)", part):
            found["search"] = match[1]
        elif match := re.fullmatch(r"(rank|span) (\d+)", part):
            found[match[1]] = int(match[2])
        else:
            raise AssertionError(f"what is {part!r}?")
    return PackedWeight(weights, **found)
