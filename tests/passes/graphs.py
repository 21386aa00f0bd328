"""Graphs as short texts: written by hand, run through a pass, printed in the same form and compared.

A text has inputs, operators and a result, one a line::

    x: f32[4, 64]                                   # an argument; n in place of a size makes it dynamic
    r: f32[4, 64] strides 1, 4                      # not contiguous
    w: param[128, 64]                               # weight of a linear ``w``; float32
    b: param.bf16[128] = "blocks.0.up.bias"         # with a dtype and a path
    s: buffer[64]
    up: hif4[128, 64]                               # a packed weight: two inputs, its codes and its scales
    q+k: hif4[64+32, 64] masked, rotated 64         # rows of two, and how they are transformed
    v: hif4[64, 64] rotated 64, seed 7, rank 8      # a seed that is not SEED ("no signs": none); the rank of a branch
    m: multiplier of q+k masked, signs
    @ blocks.0 Block, blocks.0.attn Attention       # what follows was called in these modules
    y = linear(x, w, b)                             # aten; the overload is left out where it is Tensor or default
    codes, scales = tahf4.quantize(y, None, 0)
    z = tahf4.linear(codes, scales, up, None, f32)
    return z

What a pass found out about a linear stands behind it: ``# hif4: why`` (plan), ``# body: why`` (classify), ``# kernel``
(lower). It is read as well, so that a pass that needs it can be shown alone.

All that tests of passes know about the insides of the compiler is imported here.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tahf4_compiler.backends import cpu
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tahf4_compiler import ops as our_ops
from tahf4_compiler.errors import OptionError, PackedError, PassError, PatternError
from tahf4_compiler.format.low_rank import LowRank
from tahf4_compiler.format.transforms import SEED, signs
from tahf4_compiler.graph.inputs import BESIDE, DECISION, INPUT, ROLE, GraphInput, HeldWeight, PackedInput, PackedWeight
from tahf4_compiler.model.attachments import _KEPT, _RECIPE, Attachment, attach
from tahf4_compiler.model.reasons import Cause, Reason
from tahf4_compiler.model.tree import Surroundings
from tahf4_compiler.ops import fused  # noqa: F401  (defines torch.ops.tahf4)
from tahf4_compiler.ops.registry import KERNEL, register_kernel, unregister_kernel
from tahf4_compiler.options import Options
from tahf4_compiler.pipeline.base import Pass
from tahf4_compiler.pipeline.context import Context, Decision
from tahf4_compiler.pipeline.manager import PassManager
from tahf4_compiler.pipeline.records import PassRecord
from tahf4_compiler.pipeline.rules import Role
from tahf4_compiler.pipeline.running import graph_arguments, running
from tahf4_compiler.pipeline.shapes import propagate
from tahf4_compiler.weights.store import store

__all__ = [
    "DECISION", "INPUT", "KERNEL", "SEED", "Attachment", "Cause", "LowRank", "OptionError", "PackedError", "PassError",
    "PatternError", "Ran", "Text", "arguments", "assert_pass", "assert_same", "conversions", "cpu", "other_linear",
    "plug_in", "results", "run_passes", "signs",
]  # fmt: skip

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
CONSTANTS = {
    **DTYPES, "contiguous": torch.contiguous_format, "channels_last": torch.channels_last,
    "preserve": torch.preserve_format, "strided": torch.strided, "inf": float("inf"), "cpu": torch.device("cpu"),
}  # fmt: skip
WORDS = {value: name for name, value in CONSTANTS.items() if not isinstance(value, float)}
SIZES = {"n": 5, "m": 7}
"""Dynamic sizes, with those of the example."""

_PACKED = ("codes", "scales")
_CAUSES = {
    "body": Cause.BODY, "boundary": Cause.BOUNDARY, "kept": Cause.KEPT, "sensitivity": Cause.SENSITIVITY,
    "this step runs in high precision": Cause.STEP,
}  # fmt: skip
"""What the words before a reason's colon stand for."""

SHOWN = {"classify": ROLE, "plan": DECISION, "lower": KERNEL}
"""What is printed behind the linears after a pass."""

TOLERANCE = {"normalize": 1e-6, "share": 1e-6}
"""Relative error that a pass may add where it joins or respells products: the order of float32 sums."""

NEAR = {
    **dict.fromkeys(("quantize", "smooth", "rotate", "scale_search", "span"), 0.3), "upcast": 0.02, "attention": 0.05,
}  # fmt: skip
"""Relative error of passes whose purpose is another rounding; a wrong weight or multiplier gives one of about 1."""

_INPUT = re.compile(
    r"(?P<name>[\w+]+): (?:(?P<kind>param|buffer|const|hif4)\.?)?(?P<dtype>[a-z]+\d+|bool)?\[(?P<shape>[^\]]*)\]"
    r"(?: strides (?P<strides>[\d, ]+))?(?P<meta> on meta)?(?: (?P<how>[a-z][^=]*?))?(?: = \"(?P<path>[^\"]*)\")?"
)
_PART = re.compile(r"(?P<name>\w+): (?P<part>multiplier|observer) of (?P<weights>[\w+]+)(?: (?P<how>.+))?")


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
        made = _Reader(text, values or {}).text(recipe or {}, kept or {}, blocks or {}, Options.parse(options))
        made.context.tied.update(tied or {})
        return made

    def shown(self, comments: str = "", like: str = "") -> str:
        """Return the graph as text.

        Args:
            comments: key in ``node.meta`` of what is printed behind operators.
            like: a text whose names those nodes take that this text did not have, in order.
        """
        return _Writer(self, comments, like).text()


@dataclass
class Ran:
    """What a pass did."""

    text: Text
    record: PassRecord

    @property
    def notes(self) -> list[str]:
        """What it had to say."""
        return self.text.context.notes.get(self.record.name, [])

    @property
    def plan(self) -> list[Decision]:
        return self.text.context.plan

    def node(self, opname: str) -> fx.Node:
        """Return the only call of an operator."""
        (found,) = (n for n in self.text.graph_module.graph.nodes if getattr(n.target, "_opname", "") == opname)
        return found


def assert_pass(
    before: str,
    pass_: Pass,
    after: str | None = None,
    *,
    first: Sequence[Pass] = (),
    run: bool = True,
    prepare: Callable[[fx.GraphModule], None] | None = None,
    **given: Any,
) -> Ran:
    """Run a pass over a graph and compare the graph with what it must be; results must stay what they were.

    Args:
        before: the graph.
        pass_: to run.
        after: the graph after it; by default it must stay as it is.
        first: passes that run before, if a text cannot say what they leave.
        run: whether the graph can be run, so that its results are compared: bit for bit, with strides and with what is
            written to inputs, or nearly so where a pass is there to round otherwise.
        prepare: changes the graph by hand before the pass runs, for what no text can say.
        given: as for :meth:`Text.parse`.
    """
    text = Text.parse(before, **given)
    comments = SHOWN.get(pass_.name, "")
    if first:
        text.graph_module, _ = PassManager(first).run(text.graph_module, text.context)
    if prepare is not None:
        prepare(text.graph_module)
    plain = text.shown(like=before)
    old = results(text) if run else None
    text.graph_module, (_, record) = PassManager([pass_]).run(text.graph_module, text.context)
    wanted = _normal(after if after is not None else before)
    found = text.shown(comments, wanted)
    if found != wanted:
        lines = difflib.unified_diff(wanted.splitlines(), found.splitlines(), "expected", "after the pass", lineterm="")
        raise AssertionError(f"{pass_.name} left another graph:\n" + "\n".join(lines))
    changed = text.shown(like=before) != plain
    if pass_.name != "lower":  # another target of the same name is no other text
        assert record.modified == changed, f"{pass_.name} says modified={record.modified}"
    if old is not None:
        assert_same(old, results(text), {**TOLERANCE, **NEAR}.get(pass_.name, 0.0))
    return Ran(text, record)


@torch.library.custom_op("tahf4_tests::linear", mutates_args=())
def other_linear(
    codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, span: int = 1,
) -> Tensor:  # fmt: skip
    """A kernel of a plug-in for ``tahf4::linear``."""
    return our_ops.linear(codes, scales, weight_codes, weight_scales, bias, out_dtype, span)


@other_linear.register_fake
def _(
    codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, span: int = 1,
) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], weight_codes.shape[0]), dtype=out_dtype)


def run_passes(text: Text, *passes: Pass) -> list[PassRecord]:
    """Run passes over a graph and return what each did."""
    text.graph_module, (_, *records) = PassManager(passes).run(text.graph_module, text.context)
    return records


@contextlib.contextmanager
def plug_in(names: Mapping[str, str], serves: Callable[[fx.Node], bool] = lambda node: True) -> Iterator[None]:
    """Register kernels of a plug-in: operator of ``torch.ops.tahf4`` -> name of the kernel.

    A kernel ``other`` for ``linear`` runs an operator of its own, all others run the reference.
    """
    made = []
    for operation, name in names.items():
        own = getattr(torch.ops.tahf4, operation).default
        target = torch.ops.tahf4_tests.linear.default if (operation, name) == ("linear", "other") else own
        made.append(register_kernel(name, own, target, serves))
    try:
        yield
    finally:
        for kernel in made:
            unregister_kernel(kernel)


def results(text: Text) -> list[Tensor]:
    """Run a graph with the reference operators; return its outputs, then its inputs with what was written to them."""
    torch.manual_seed(0)
    given = arguments(text)
    held = []
    for node in text.graph_module.graph.find_nodes(op="placeholder"):
        source, value = node.meta[INPUT], given[node.name]
        if isinstance(source, PackedInput):
            shown = node.meta["val"]
            assert (shown.shape, shown.dtype) == (value.shape, value.dtype), f"{node.name} is not what its node says"
        elif source.kind != "parameter":
            held.append(value)
    with running():
        out = fx.Interpreter(text.graph_module).run(*given.values())
    leaves = torch.utils._pytree.tree_leaves(out)
    return [value for value in (*leaves, *held) if isinstance(value, Tensor)]


def arguments(text: Text) -> dict[str, Any]:
    """Return what a graph is called with, by the names of its inputs."""
    values = graph_arguments(text.graph_module, text.context)
    return dict(zip((n.name for n in text.graph_module.graph.find_nodes(op="placeholder")), values, strict=True))


def conversions() -> int:
    """Return how many weights were packed in this process."""
    return store.conversions


def assert_same(old: Sequence[Tensor], new: Sequence[Tensor], tolerance: float = 0.0) -> None:
    """Assert that results are the same: shapes, types, strides and values, or these up to a relative error."""
    assert len(old) == len(new)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        assert (a.shape, a.dtype, _strides(a)) == (b.shape, b.dtype, _strides(b)), f"result {i}"
        if tolerance and a.is_floating_point():
            error = (a.double() - b.double()).norm() / a.double().norm()
            assert error <= tolerance, f"result {i} differs: relative error {error:.1e}"
        else:
            same = torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0)) if a.is_floating_point() else torch.equal(a, b)
            assert same, f"result {i} differs: {(a.double() - b.double()).abs().max():.1e}"


def _strides(value: Tensor) -> list[int]:
    """Return the strides of the axes that have more than one position; others mean nothing."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


# Reading


def _lines(text: str) -> Iterator[str]:
    """Yield the statements: a line goes on while a bracket is open."""
    pending = ""
    for line in text.splitlines():
        pending = f"{pending} {line.strip()}".strip()
        if pending and pending.count("(") + pending.count("[") <= pending.count(")") + pending.count("]"):
            yield re.sub(r"([(\[]) ", r"\1", pending)
            pending = ""
    assert not pending, f"a bracket is open: {pending}"


def _normal(text: str) -> str:
    return "\n".join(_lines(text))


def _parts(line: str) -> tuple[str, str]:
    """Return a statement and what stands behind it."""
    statement, _, comment = line.partition("  # ")
    return statement.rstrip(), comment.strip()


class _Reader:
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
        for line in _lines(text):
            self.read(*_parts(line))

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
        target = _target(function, args)
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


_SPACES = ("tahf4.", "tahf4_tests.", "prims.")


def _target(function: str, args: Sequence[Any]) -> Any:
    if function == "getitem":
        return operator.getitem
    space, *names = function.split(".") if function.startswith(_SPACES) else ["aten", *function.split(".")]
    packet = getattr(getattr(torch.ops, space), names[0])
    if len(names) > 1:
        return getattr(packet, names[1])
    return getattr(packet, next((name for name in ("Tensor", "default") if name in packet.overloads()), "none"), None)


# Printing


class _Writer:
    def __init__(self, text: Text, comments: str, like: str) -> None:
        self.text_, self.comments = text, comments
        self.graph = text.graph_module.graph
        known = {n.name for n in self.graph.nodes} & (set(text.lines) | _defined(like))
        self.fresh = iter([name for name in _names(like) if name not in known])
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
        return _normal("\n".join(out).replace("@\nreturn", "return"))

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
            if isinstance(source, PackedInput) and source.part in _PACKED and isinstance(source.weight, PackedWeight):
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
            if isinstance(source, PackedInput) and source.part in _PACKED and isinstance(source.weight, PackedWeight):
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
    return name if _target(name, ()) is target else f"{name}.{target._overloadname}"


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


def _names(text: str) -> list[str]:
    """Return what a text defines, in order."""
    found: list[str] = []
    for line in _lines(text):
        statement, _ = _parts(line)
        if (match := re.match(r"([\w, ]+?),? = \w", statement)) is not None:
            found += [part.strip() for part in match[1].split(",") if part.strip() not in ("", "_")]
        elif (match := re.match(r"(\w+): (?:multiplier|observer|held) ", statement)) is not None:
            found.append(match[1])
    return found


def _defined(text: str) -> set[str]:
    return set(_names(text))
