"""Small programs: what a fused kernel computes before it quantizes, or after its product.

A program is text, so that a graph that holds one can be printed, exported and cached, and a kernel generator can read
it. One statement a line, an assignment with the dtype of its result::

    a: float32 = to(x0)
    b: float32 = layer_norm(a, None, None, 1e-06)
    c: float32 = add(x1, 1)
    d: float32 = mul(b, c)
    e: bfloat16 = to(d)

``x0, x1, ...`` are the tensors of the fused operator and broadcast as in PyTorch, ``y`` is the product of a linear; the
last statement is the result; an empty program returns its first input. Every statement means what PyTorch's own
operator does: it computes in float32 at least and rounds to its dtype. ``layer_norm``, ``rms_norm`` and ``mean`` run
along the last axis. ``matmul(x2, x3)`` is of two neighbouring inputs, ``[..., r]`` and ``[r, N]``, that broadcast to
nothing and that nothing else reads. ``rotary(v0, x1, x2)`` turns neighbouring pairs of channels by angles. Its last
arguments are their cosines and sines: two neighbouring inputs ``[..., E / 2]`` that nothing else reads, for heads of E
channels side by side.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import FormatError

__all__ = ["FUNCTIONS", "REDUCTIONS", "Function", "Program", "Statement", "call_of", "factors_of"]

aten = torch.ops.aten
Argument = str | float | int | None

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Function:
    """A function that programs may call.

    Attributes:
        run: on tensors and numbers, in PyTorch.
        operators: that it stands for.
    """

    run: Callable[..., Tensor]
    operators: tuple[Any, ...]


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.to(torch.float32).unflatten(-1, (-1, cos.shape[-1], 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for each head
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-3)


def _to(x: Tensor) -> Tensor:
    return x  # the statement's dtype does it


FUNCTIONS: Mapping[str, Function] = {
    "to": Function(_to, (aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.to.dtype_layout)),
    "add": Function(torch.add, (aten.add.Tensor, aten.add.Scalar)),
    "sub": Function(torch.sub, (aten.sub.Tensor, aten.sub.Scalar)),
    "mul": Function(torch.mul, (aten.mul.Tensor, aten.mul.Scalar)),
    "div": Function(torch.div, (aten.div.Tensor, aten.div.Scalar)),
    "neg": Function(torch.neg, (aten.neg.default,)),
    "abs": Function(torch.abs, (aten.abs.default,)),
    "exp": Function(torch.exp, (aten.exp.default,)),
    "sqrt": Function(torch.sqrt, (aten.sqrt.default,)),
    "rsqrt": Function(torch.rsqrt, (aten.rsqrt.default,)),
    "sigmoid": Function(torch.sigmoid, (aten.sigmoid.default,)),
    "relu": Function(torch.relu, (aten.relu.default,)),
    "silu": Function(torch.nn.functional.silu, (aten.silu.default,)),
    "gelu": Function(torch.nn.functional.gelu, (aten.gelu.default,)),
    "gelu_tanh": Function(_gelu_tanh, ()),  # aten.gelu with approximate="tanh"
    "square": Function(torch.square, (aten.square.default, aten.pow.Tensor_Scalar)),
    "layer_norm": Function(_layer_norm, (aten.layer_norm.default,)),
    "rms_norm": Function(_rms_norm, (aten.rms_norm.default,)),
    "mean": Function(_mean, (aten.mean.dim,)),
    "matmul": Function(torch.matmul, ()),  # factors_of finds its nodes
    "rotary": Function(_rotary, ()),  # the pass `attention_prologue` finds its nodes
}
"""Name in programs -> function."""

REDUCTIONS = ("layer_norm", "rms_norm", "mean")
"""Functions along the last axis; all others but ``matmul`` and ``rotary`` are pointwise."""

_BY_OPERATOR = {operator: name for name, function in FUNCTIONS.items() for operator in function.operators}


@dataclass(frozen=True)
class Statement:
    """``name: dtype = function(arguments)``; an argument is a name, a number or None."""

    name: str
    dtype: torch.dtype
    function: str
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        """Return the statement as text."""
        return f"{self.name}: {_NAMES[self.dtype]} = {self.function}({', '.join(map(str, self.arguments))})"

    def names(self) -> list[str]:
        """Return the names that it reads."""
        return [a for a in self.arguments if isinstance(a, str)]


@dataclass(frozen=True)
class Program:
    """Statements, in order.

    Attributes:
        statements: each reads inputs and earlier statements.
    """

    statements: tuple[Statement, ...] = ()

    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads."""
        return "\n".join(map(str, self.statements))

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read a program; nothing in it is executed.

        Raises:
            FormatError: text that is no program.
        """
        return _parse(text)

    def result(self, default: str) -> str:
        """Return the name of the result; ``default`` if there are no statements."""
        return self.statements[-1].name if self.statements else default

    def factors(self) -> list[int]:
        """Return the numbers of the inputs ``[..., r]`` of ``matmul``; the ``[r, N]`` of each is the next one."""
        return [int(str(s.arguments[0])[1:]) for s in self.statements if s.function == "matmul"]

    def angles(self) -> list[int]:
        """Return the numbers of the inputs ``[..., E / 2]`` of ``rotary``: cosines, and sines."""
        return [int(str(a)[1:]) for s in self.statements if s.function == "rotary" for a in s.arguments[1:]]

    def shape(self, inputs: Sequence[Tensor]) -> torch.Size:
        """Return the shape of the result of a program without ``matmul``, to which all but the angles broadcast."""
        angles = self.angles()
        return torch.broadcast_shapes(*(x.shape for i, x in enumerate(inputs) if i not in angles))

    def reduction(self) -> Statement | None:
        """Return the first statement that reduces along the last axis."""
        return next((s for s in self.statements if s.function in REDUCTIONS), None)

    def run(self, values: Mapping[str, Tensor], default: str) -> Tensor:
        """Run the program with PyTorch's operators.

        Args:
            values: the inputs by name.
            default: name of the result of an empty program.

        Returns:
            The last statement's value.
        """
        known = dict(values)
        for statement in self.statements:
            missing = [name for name in statement.names() if name not in known]
            if missing:
                raise FormatError(f"'{statement}' reads {missing[0]!r}; expected one of {', '.join(known)}")
            arguments = [known[a] if isinstance(a, str) else a for a in statement.arguments]
            known[statement.name] = FUNCTIONS[statement.function].run(*arguments).to(statement.dtype)
        return known[self.result(default)]


@functools.cache
def _parse(text: str) -> Program:
    statements = []
    known: set[str] = set()
    try:
        lines = ast.parse(text).body
    except SyntaxError as error:
        raise FormatError(f"not a program of a fused operator: {error}") from None
    for line in lines:
        shown = ast.unparse(line)
        if (
            not isinstance(line, ast.AnnAssign)
            or not isinstance(line.target, ast.Name)
            or not isinstance(line.annotation, ast.Name)
            or not isinstance(line.value, ast.Call)
            or not isinstance(line.value.func, ast.Name)
        ):
            raise FormatError(f"{shown!r} is no statement of a program; expected `name: dtype = function(...)`")
        function, dtype = line.value.func.id, DTYPES.get(line.annotation.id)
        if function not in FUNCTIONS or dtype is None or line.value.keywords:
            raise FormatError(
                f"{shown!r}: expected a function of {', '.join(FUNCTIONS)} without keywords and a dtype of "
                f"{', '.join(DTYPES)}"
            )
        arguments = tuple(_argument(a, shown) for a in line.value.args)
        try:
            _signature(function).bind(*arguments)
        except TypeError as error:
            raise FormatError(f"{shown!r}: {error}") from None
        statements.append(Statement(line.target.id, dtype, function, arguments))
        unknown = [a for a in arguments if isinstance(a, str) and a not in known and not _is_input(a)]
        if unknown:
            raise FormatError(f"{shown!r} reads {unknown[0]!r}, which is no input and no earlier statement")
        known.add(line.target.id)
    read = [name for statement in statements for name in statement.names()]
    for statement in statements:
        if statement.function in ("matmul", "rotary") and not _ends_in_inputs(statement, read):
            raise FormatError(f"'{statement}': expected two neighbouring inputs (x0, x1) that nothing else reads")
    return Program(tuple(statements))


def _ends_in_inputs(statement: Statement, read: list[str]) -> bool:
    left, right = map(str, statement.arguments[-2:])
    inputs = _is_input(left) and left != "y" and right == f"x{int(left[1:]) + 1}"
    return inputs and read.count(left) == read.count(right) == 1


@functools.cache
def _signature(function: str) -> inspect.Signature:
    run = FUNCTIONS[function].run
    try:
        return inspect.signature(run)
    except ValueError:  # PyTorch's own have none
        names = ("x", "y")[: 2 if function in ("add", "sub", "mul", "div", "matmul") else 1]
        return inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names])


def _is_input(name: str) -> bool:
    return name == "y" or (name[0] == "x" and name[1:].isdigit())


def _argument(node: ast.expr, shown: str) -> Argument:
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = ...
    if value is not None and not isinstance(value, int | float):
        raise FormatError(f"{shown!r}: {ast.unparse(node)!r} is no name, number or None")
    return value


def call_of(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    """Return the function of programs that a node of a graph stands for, and its arguments (nodes, numbers, None).

    Args:
        node: with a tensor in ``meta["val"]``.

    Returns:
        None if programs cannot say it.
    """
    name = _BY_OPERATOR.get(node.target) if node.op == "call_function" else None
    value = node.meta.get("val")
    if name is None or not isinstance(value, Tensor) or value.dtype not in _NAMES:
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    if name == "to":
        # Only casts: no device, layout or memory format.
        same = isinstance(args[0], fx.Node) and args[0].meta["val"].device == value.device
        return ("to", (args[0],)) if same and not kwargs.get("memory_format") else None
    if name in ("add", "sub"):
        if kwargs.pop("alpha", 1) != 1 or (len(args) > 2 and args[2] != 1):
            return None
        args = args[:2]
    elif name == "gelu":
        name = "gelu_tanh" if kwargs.pop("approximate", "none") == "tanh" else "gelu"
    elif name == "square":
        if args[1:] not in ([], [2], [2.0]):
            return None
        args = args[:1]
    elif name == "layer_norm":
        x, shape, weight, bias, eps = _padded(args, [None, None, None, None, 1e-5])
        if len(shape) != 1:
            return None
        args, kwargs = [x, kwargs.pop("weight", weight), kwargs.pop("bias", bias), kwargs.pop("eps", eps)], {}
    elif name == "rms_norm":
        x, shape, weight, eps = _padded(args, [None, None, None, None])
        if len(shape) != 1:
            return None
        args = [x, kwargs.pop("weight", weight), kwargs.pop("eps", eps)]
    elif name == "mean":
        rank = args[0].meta["val"].dim() if isinstance(args[0], fx.Node) else 0
        dims = args[1] if len(args) > 1 else kwargs.pop("dim", None)
        keep = args[2] if len(args) > 2 else kwargs.pop("keepdim", False)
        if not keep or not isinstance(dims, list | tuple) or list(dims) not in ([-1], [rank - 1]) or len(args) > 3:
            return None
        args = args[:1]
    plain = all(a is None or isinstance(a, fx.Node) or _is_finite_number(a) for a in args)
    return (name, tuple(args)) if plain and not kwargs else None


def factors_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the factors ``[..., r]`` and ``[r, N]`` of a product that programs can say.

    Args:
        node: of a graph.

    Returns:
        None if it is another node, or its factors have other shapes.
    """
    if node.target is not aten.matmul.default:
        return None
    left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else 2 * node.all_input_nodes
    value = right.meta.get("val")
    return (left, right) if isinstance(value, Tensor) and value.dim() == 2 else None


def _padded(args: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    return [*args[: len(defaults)], *defaults[len(args) :]]


def _is_finite_number(value: Any) -> bool:
    # Normal in float32: generated code writes it as a literal.
    return type(value) in (int, float) and (value == 0 or 2.0**-126 <= abs(value) < 2.0**128)
