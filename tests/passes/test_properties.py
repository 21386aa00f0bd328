"""Random graphs of linears, norms, views and writes: sharing and fusing keep their results, bit for bit.

Graphs are made as texts (``graphs.py``): a failure shows one that can be put into a test as it is. Rows of 64 values
are one unit of HiF4, whose products are exact, so that merging them changes no bit either.

``TAHF4_EXAMPLES`` in the environment is the number of graphs, 60 by default.
"""

from __future__ import annotations

import os

import pytest
from graphs import Text, assert_same, results, run_passes
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from tahf4_compiler.passes.fuse import Fuse
from tahf4_compiler.passes.plan import Plan
from tahf4_compiler.passes.quantize import Quantize
from tahf4_compiler.passes.share import Share

EXAMPLES = int(os.environ.get("TAHF4_EXAMPLES", "60"))
pytestmark = pytest.mark.timeout(600 + EXAMPLES)
SETTINGS = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# ``{0}`` is a value [4, 64], ``{1}`` another one of its type, ``{2}`` a row of its type, ``{3}`` a float32 row, ``{4}``
# a number without axes.
POINTWISE = ("relu({0})", "silu({0})", "neg({0})", "add({0}, 1)", "add({0}, {1})", "mul({0}, {1})", "mul({1}, {0})",
             "add({0}, {2})", "mul({2}, {0})", "mul({0}, {4})", "sub({1}, {0})", "gelu({0}, approximate='tanh')",
             "pow.Tensor_Scalar({0}, 2)", "softmax.int({0}, -1)", "type_as({0}, {1})")  # fmt: skip
NORMS = (
    "layer_norm({0}, [64], None, None, 1e-05)",
    "rms_norm({0}, [64], {2}, 1e-06)",
    "rms_norm({0}, [64], None, 1e-06)",
)
WIDER = ("to.dtype({0}, f32)", "mul({0}, {3})", "add({3}, {0})")
VIEWS = ("view({0}, [2, 2, 64])", "view({0}, [4, 2, 32])", "t({0})", "view({0}, [4, 64])", "slice({0}, 1, 0, 32)",
         "view({0}, [256])", "transpose.int({0}, 0, 1)")  # fmt: skip
COPIES = ("clone({0}, memory_format=contiguous)", "contiguous({0})", "clone({0})")
WRITES = ("add_({0}, 0.25)", "mul_({0}, 0.5)", "relu_({0})", "fill_.Scalar({0}, 0.125)")
WRITES_OF_TWO = ("copy_({0}, {1})", "sub_({0}, {1})", "add_({0}, {1})")


class _Made:
    """A graph in the making."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from(["f32", "f32", "bf16"]))
        self.lines = [f"{name}: {self.dtype}[4, 64]" for name in ("x", "u")]
        self.lines += ["wide0: buffer[64]", "num0: f32[]", f"row0: buffer.{self.dtype}[64]"]
        self.lines += [f"w{i}: param.{self.dtype}[64, 64]" for i in range(4)]
        self.lines += [f"b0: param.{self.dtype}[64]", f"b1: buffer.{self.dtype}[64]"]
        self.values = {"x": self.dtype, "u": self.dtype}  # of four rows, with their types
        self.views: list[str] = []
        self.plain = ["x", "u"]  # those that a flattening view may read
        for i in range(draw(st.integers(2, 12))):
            self.step(f"v{i}")
        made = [*self.views, *list(self.values)[2:]] or ["x"]
        others = draw(st.lists(st.sampled_from(made), max_size=2))
        self.lines.append("return " + ", ".join(dict.fromkeys([made[-1], *others])))

    def one(self, *options: str) -> str:
        return self.draw(st.sampled_from(options))

    def step(self, name: str) -> None:
        newest = self.draw(st.integers(0, 3)) > 0  # chains are what passes look for
        source = list(self.values)[-1] if newest else self.one(*self.values)
        dtype = self.values[source]
        row = {"f32": "wide0" if self.dtype != "f32" else "row0", "bf16": "row0"}[dtype]
        parts = (source, self.one(*(k for k, v in self.values.items() if v == dtype)), row, "wide0", "num0")
        kind = self.one(
            "linear", "linear", "siblings", "point", "point", "norm", "wider", "back", "view", "copy", "write"
        )
        if kind in ("linear", "siblings"):
            if dtype != self.dtype:
                self.lines.append(f"{name}_c = to.dtype({source}, {self.dtype})")
                source = f"{name}_c"
            for j in range(2 if kind == "siblings" else 1):
                weight, bias = self.draw(st.integers(0, 3)), self.one("None", "None", "b0", "b1", "row0")
                self.add(f"{name}_{j}", f"linear({source}, w{weight}, {bias})", self.dtype)
        elif kind == "view":
            views = VIEWS if source in self.plain else ("t({0})",)
            self.lines.append(f"{name} = {self.one(*views).format(source)}")
            self.views.append(name)
        elif kind == "write":
            target = self.one(source, source, *self.views[-2:], "wide0", "row0", "b1")
            writes = WRITES + (WRITES_OF_TWO if target == source else ())
            self.lines.append(f"{name} = {self.one(*writes).format(target, parts[1])}")
        elif kind == "wider":
            self.add(name, self.one(*WIDER).format(*parts), "f32")
        elif kind == "back":
            self.add(name, f"to.dtype({source}, {self.dtype})", self.dtype)
        else:
            operators = {"norm": NORMS, "copy": COPIES, "point": POINTWISE}[kind]
            self.add(name, self.one(*operators).format(*parts), dtype)

    def add(self, name: str, call: str, dtype: str) -> None:
        self.lines.append(f"{name} = {call}")
        self.values[name] = dtype
        if not call.startswith("type_as"):
            self.plain.append(name)


@st.composite
def graphs(draw: st.DrawFn) -> str:
    """Return a graph as text: operators one after the other, each on a value that there is."""
    return "\n".join(_Made(draw).lines)


@SETTINGS
@given(graphs())
def test_share_and_fuse_keep_every_bit(graph: str) -> None:
    text = Text.parse(graph)
    run_passes(text, Plan(), Quantize())
    reference = results(text)
    for pass_ in (Share(), Fuse(always=True)):
        (record,) = run_passes(text, pass_)
        note(f"after {pass_.name}:\n{text.shown()}")
        assert_same(reference, results(text))
        event(f"{pass_.name} changed it" if record.modified else f"{pass_.name} left it")


@SETTINGS
@given(graphs())
def test_fuse_alone_keeps_every_bit(graph: str) -> None:
    text = Text.parse(graph)
    run_passes(text, Plan(), Quantize(), Share(merge=False))
    reference = results(text)
    run_passes(text, Fuse(always=True))
    note(f"after fuse:\n{text.shown()}")
    assert_same(reference, results(text))
