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

``graph_reading.py`` reads texts, ``graph_printing.py`` prints graphs. All that tests of passes know about the insides
of the compiler is imported in these files.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graph_reading import Text
from graph_words import normal
from tahf4_compiler.backends import cpu
from torch import Tensor, fx

from tahf4_compiler import ops as our_ops
from tahf4_compiler.errors import OptionError, PackedError, PassError, PatternError
from tahf4_compiler.format.low_rank import LowRank
from tahf4_compiler.format.transforms import SEED, signs
from tahf4_compiler.graph.inputs import DECISION, INPUT, ROLE, PackedInput
from tahf4_compiler.model.attachments import Attachment
from tahf4_compiler.model.reasons import Cause, Reason
from tahf4_compiler.ops import fused  # noqa: F401  (defines torch.ops.tahf4)
from tahf4_compiler.ops.registry import KERNEL, register_kernel, unregister_kernel
from tahf4_compiler.pipeline.base import Pass
from tahf4_compiler.pipeline.context import Decision
from tahf4_compiler.pipeline.manager import PassManager
from tahf4_compiler.pipeline.records import PassRecord
from tahf4_compiler.pipeline.running import graph_arguments, relative_error, running
from tahf4_compiler.weights.store import store

__all__ = [
    "DECISION", "INPUT", "KERNEL", "SEED", "Attachment", "Cause", "LowRank", "OptionError", "PackedError", "PassError",
    "PatternError", "Ran", "Reason", "Text", "arguments", "assert_pass", "assert_same", "conversions", "cpu",
    "other_linear", "plug_in", "relative_error", "results", "run_passes", "signs",
]  # fmt: skip

SHOWN = {"classify": ROLE, "plan": DECISION, "lower": KERNEL}
"""What is printed behind the linears after a pass."""

TOLERANCE = {"normalize": 1e-6, "share": 1e-6}
"""Relative error that a pass may add where it joins or respells products: the order of float32 sums."""

NEAR = {
    **dict.fromkeys(("quantize", "smooth", "rotate", "scale_search", "span"), 0.3), "upcast": 0.02, "attention": 0.05,
}  # fmt: skip
"""Relative error of passes whose purpose is another rounding; a wrong weight or multiplier gives one of about 1."""


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
    wanted = normal(after if after is not None else before)
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
