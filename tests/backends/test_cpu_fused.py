"""Fused operators on the CPU: programs in C++ before quantizations and after products."""

from __future__ import annotations

import cpu_operators
import pytest
import torch
from helpers import GRAPH, relative
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu.programs import encode

import tahf4_compiler as tahf4
from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4
from tahf4_compiler.ops import registry

pytestmark = pytest.mark.skipif(
    not cpu.available() or cpu.instruction_set() == "none", reason="needs a C++ compiler and AVX2"
)
FLOAT, HALF = "float32", "bfloat16"
reference = torch.ops.tahf4


@pytest.fixture(params=cpu_operators.sets()[1:], autouse=True)
def _set(request, monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", request.param)
    registry.kernels()


def text(*lines):
    return "\n".join(f"v{i}: {dtype} = {call}" for i, (dtype, call) in enumerate(lines))


def packed(rows, k, *lead):
    return torch.ops.tahf4.quantize(torch.randn(*lead, rows, k))


EXACT = [
    text((FLOAT, "to(x0)"), (FLOAT, "add(x1, 1)"), (FLOAT, "mul(v0, v1)"), (HALF, "to(v2)")),
    text((HALF, "mul(x0, x1)"), (HALF, "sub(v0, x2)"), (HALF, "neg(v1)")),
    text(("float16", "to(x0)"), ("float16", "add(v0, x3)"), (FLOAT, "abs(v1)"), (FLOAT, "div(v2, x1)")),
    text((FLOAT, "to(x0)"), (FLOAT, "square(v0)"), (FLOAT, "sqrt(v1)"), (HALF, "relu(x2)"), (FLOAT, "add(v2, v3)")),
    text((FLOAT, "to(x0)"), (FLOAT, "sub(2, v0)"), (FLOAT, "mul(v1, v1)"), (FLOAT, "add(v1, v2)")),
]
NEAR = [
    text((FLOAT, "to(x0)"), (FLOAT, "layer_norm(v0, None, None, 1e-06)"), (FLOAT, "add(x1, 1)"), (FLOAT, "mul(v1, v2)"),
         (FLOAT, "add(v3, x2)"), (HALF, "to(v4)")),
    text((FLOAT, "layer_norm(x0, x4, x4, 1e-05)")),
    text((FLOAT, "to(x0)"), (FLOAT, "rms_norm(v0, x4, 1e-06)"), (FLOAT, "add(v1, v0)")),
    text((FLOAT, "to(x0)"), (FLOAT, "square(v0)"), (FLOAT, "mean(v1)"), (FLOAT, "add(v2, 1e-06)"), (FLOAT, "rsqrt(v3)"),
         (FLOAT, "mul(v0, v4)")),
    *(text((FLOAT, "to(x0)"), (FLOAT, f"{f}(v0)")) for f in ("gelu", "gelu_tanh", "silu", "sigmoid", "exp")),
    text((HALF, "gelu_tanh(x2)"), (HALF, "mul(v0, x3)")),
]


def inputs_for(k, dtype):
    return [
        torch.randn(2, 5, k).to(dtype),
        torch.randn(2, 1, 2 * k)[..., ::2].to(torch.float32) + 3,
        torch.randn(5, k).to(torch.bfloat16).expand(2, 5, k),
        torch.randn(2, 5, 1).to(dtype),
        torch.rand(k) + 0.5,
    ]


def used(program, inputs):
    """Keep the inputs up to the last that is named, all of full shape or broadcast."""
    return inputs[: 1 + max(i for i in range(5) if f"x{i}" in program)]


def expected_values(program, inputs):
    from tahf4_compiler.ops.program import Program

    return Program.parse(program).run({f"x{i}": x for i, x in enumerate(inputs)}, "x0")


@pytest.mark.parametrize("program", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_programs_give_the_bits_of_the_reference(program, dtype):
    for k, block in ((64, 0), (100, 64), (256, 64), (200, 256), (1, 0)):
        inputs = used(program, inputs_for(k, dtype))
        wanted = torch.broadcast_to(expected_values(program, inputs), (2, 5, k)).contiguous()
        multiplier = torch.rand(k) + 0.5
        got = cpu_operators.fused_quantize(inputs, program, multiplier, block)
        for a, b in zip(got, reference.quantize(wanted, multiplier, block), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("program", NEAR)
def test_norms_and_exponentials_are_near(program):
    for k in (64, 100, 640):
        inputs = used(program, inputs_for(k, torch.float32))
        wanted = torch.broadcast_to(expected_values(program, inputs), (2, 5, k)).contiguous()
        wanted = reference.quantize(wanted)
        got = cpu_operators.fused_quantize(inputs, program)
        a, b = (hif4.dequantize(hif4.Packed(*p, k)) for p in (got, wanted))
        assert torch.equal(a.isnan(), b.isnan())
        # A value at a boundary takes another code; one at the boundary of a scale moves its unit.
        assert ((a != b) & ~a.isnan()).float().mean() < 0.02
        assert relative(a.nan_to_num(), b.nan_to_num()) < 0.02


FUNCTIONS = [("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu), ("exp", torch.exp),
             ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")), ("sigmoid", torch.sigmoid)]


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_functions_keep_their_digits(name, function):
    # What a product of zero plus a bias is sent through: the bias itself.
    bias = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-120.0, 120.0, 0.0, -0.0, 1e-30])])
    weight, x = packed(len(bias), 64), reference.quantize(torch.zeros(2, 64))
    (got,) = cpu_operators.fused_linear(
        *x, *weight, bias, torch.float32, [len(bias)], [], f"v0: float32 = {name}(y)", torch.float32
    )
    wanted = function(bias.double()).float()
    assert torch.allclose(got[0], wanted, rtol=2e-6, atol=1e-6 if name != "exp" else 1e-30)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38])
    (got,) = cpu_operators.fused_linear(
        *x, *packed(4, 64), special, torch.float32, [4], [], f"v0: float32 = {name}(y)", torch.float32
    )
    if name in ("exp", "sigmoid"):
        assert torch.allclose(got[0], function(special), equal_nan=True)
    assert got[0, 2].isnan()


def product_args(m, k, n, dtype, lead=()):
    return (*packed(m, k, *lead), *packed(n, k), torch.randn(n), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 1), (7, 200, 65), (50, 256, 192), (13, 64, 33), (2000, 64, 100)])
def test_gates_residuals_and_several_results(dtype, m, k, n):
    args = product_args(m, k, n, dtype, (2,))
    gate, residual = torch.randn(2, 1, n), torch.randn(2, m, 2 * n)[..., ::2].to(dtype)
    program = text((FLOAT, "mul(y, x0)"), (FLOAT, "add(x1, v0)"))
    args += ([n], [gate, residual], program, torch.float32)
    (got,), (wanted,) = cpu_operators.fused_linear(*args), reference.fused_linear(*args)
    assert got.is_contiguous() and got.dtype == torch.float32
    assert relative(got, wanted) < (1e-6 if dtype == torch.float32 else 4e-3)
    whole = cpu_operators.linear(*args[:6])
    sizes = [n // 3, n - n // 3 - n // 4, n // 4]
    parts = cpu_operators.fused_linear(*args[:6], sizes, [], "", dtype)
    assert [p.shape[-1] for p in parts] == sizes and all(p.is_contiguous() for p in parts)
    assert torch.equal(torch.cat(parts, -1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "block"), [(64, 64), (100, 0), (100, 128), (256, 256), (33, 64), (192, 64), (1024, 512)])
def test_a_product_and_its_quantization_are_those_one_after_the_other(dtype, n, block):
    name = str(dtype)[6:]
    for m in (1, 9, 60):
        args = product_args(m, 128, n, dtype)
        if m == 9:
            args[1][3, 0] |= 0xFF  # a row that is no number
        multiplier = torch.rand(n) + 0.5
        for program in ("", f"v0: {name} = gelu_tanh(y)", f"v0: float32 = mul(y, x0)\nv1: {name} = to(v0)"):
            inputs = [torch.randn(n)] if "x0" in program else []
            (y,) = cpu_operators.fused_linear(*args, [n], inputs, program, dtype)
            got = cpu_operators.linear_quantize(*args, inputs, program, multiplier, block)
            for a, b in zip(got, reference.quantize(y, multiplier, block), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 8), (7, 65, 24), (50, 192, 64)])
def test_a_branch_of_low_rank_is_added_to_its_product(dtype, m, n, r):
    """The factors are columns of wider tensors; a second branch has the rank 1."""
    args, name = product_args(m, 128, n, dtype, (2,)), str(dtype)[6:]
    left, right = (torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]] for shape in ((2, m, r), (r, n)))
    column, row, gate = torch.randn(2, m, 1).to(dtype), torch.randn(1, n).to(dtype), torch.randn(n)
    program = text((name, "matmul(x1, x2)"), (name, "add(y, v0)"), (name, "matmul(x3, x4)"), (FLOAT, "mul(v1, x0)"),
                   (FLOAT, "add(v3, v2)"))  # fmt: skip
    args += ([n], [gate, left, right, column, row], program, torch.float32)
    (got,), (wanted,) = cpu_operators.fused_linear(*args), reference.fused_linear(*args)
    assert relative(got, wanted) < (1e-6 if dtype == torch.float32 else 4e-3)
    units = cpu_operators.linear_quantize(*args[:6], *args[7:9], None, 64 if n > 1 else 0)
    for a, b in zip(units, reference.quantize(got, None, 64 if n > 1 else 0), strict=True):
        assert torch.equal(a, b)


def test_factors_are_read_at_each_call_and_each_row_is_multiplied_alone():
    args, program = product_args(6, 64, 130, torch.float32), text((FLOAT, "matmul(x0, x1)"), (FLOAT, "add(y, v0)"))
    left, right = torch.randn(6, 24), torch.randn(24, 130)

    def call(rows=slice(None)):
        given = (*(x[rows] for x in args[:2]), *args[2:], [130], [left[rows], right], program, torch.float32)
        return cpu_operators.fused_linear(*given)[0]

    before = call()
    assert torch.equal(before, torch.cat([call(slice(i, i + 1)) for i in range(6)]))
    right.numpy()[:] += 1  # no counter of versions sees this
    assert relative(call() - before, left.sum(1, keepdim=True).expand(6, 130)) < 1e-5


def test_factors_that_do_not_fit_are_refused():
    args, program = product_args(2, 64, 8, torch.float32), text((FLOAT, "matmul(x0, x1)"), (FLOAT, "add(y, v0)"))
    left, right = torch.randn(2, 16), torch.randn(16, 8)
    wrong = [(left[:1], right), (left[:, :8], right), (left, right[:, :4]), (left, right[None]), (left, right.half()),
             (left,)]  # fmt: skip
    for factors in wrong:
        with pytest.raises(FormatError, match="got factors of shapes"):
            cpu_operators.fused_linear(*args, [8], list(factors), program, torch.float32)
    for text_, default in ((program, "x0"), (text((FLOAT, "matmul(x0, x1)")), "y")):
        assert encode(text_, default) is None


def test_threads_change_nothing():
    before = torch.get_num_threads()
    args, x = product_args(300, 128, 200, torch.float32), torch.randn(300, 200)
    norm = text((FLOAT, "layer_norm(x0, None, None, 1e-06)"))
    factors = torch.randn(300, 24), torch.randn(24, 200)
    branch = text((FLOAT, "matmul(x1, x2)"), (FLOAT, "add(y, v0)"))
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            (y,) = cpu_operators.fused_linear(*args, [200], [x], text((FLOAT, "add(y, x0)")), torch.float32)
            (y,) = cpu_operators.fused_linear(*args, [200], [y, *factors], branch, torch.float32)
            units = cpu_operators.linear_quantize(*args, [], text((FLOAT, "gelu(y)")))
            results.append((y, *units, *cpu_operators.fused_quantize([x], norm)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_input_says_what_was_expected():
    x, args = torch.randn(2, 64), product_args(2, 64, 8, torch.float32)
    with pytest.raises(FormatError, match="more than one reduction"):
        cpu_operators.fused_quantize([x], text((FLOAT, "mean(x0)"), (FLOAT, "sub(x0, v0)"), (FLOAT, "mean(v1)")))
    with pytest.raises(FormatError, match=r"torch.float64; expected"):
        cpu_operators.fused_quantize([x.double()], text((FLOAT, "to(x0)")))
    with pytest.raises(FormatError, match="expected one that broadcasts"):
        cpu_operators.fused_linear(*args, [8], [torch.randn(3, 8)], text((FLOAT, "add(y, x0)")), torch.float32)
    with pytest.raises(FormatError, match="expected their sum"):
        cpu_operators.fused_linear(*args, [7], [], "", torch.float32)
    with pytest.raises(FormatError, match="result_dtype says"):
        cpu_operators.fused_linear(*args, [8], [], text((HALF, "to(y)")), torch.float32)
    assert encode(text((FLOAT, "add(x0, x16)")), "x0") is None


def test_empty_rows():
    args = product_args(0, 64, 8, torch.float32)
    assert cpu_operators.fused_linear(*args, [8], [], text((FLOAT, "relu(y)")), torch.float32)[0].shape == (0, 8)
    assert cpu_operators.linear_quantize(*args, [], "")[0].shape == (0, 32)
    assert cpu_operators.fused_quantize([torch.randn(0, 64)], text((FLOAT, "relu(x0)")))[0].shape == (0, 32)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(128), torch.nn.Linear(128, 256), torch.nn.Linear(256, 128)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_are_fused_on_the_cpu(dtype):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(*(Block() for _ in range(2))).eval().to(dtype), torch.randn(2, 9, 128, dtype=dtype)
    captured = tahf4.capture(model, (x,))
    fused = tahf4.lower(captured, options=GRAPH)
    apart = tahf4.lower(captured, options={**GRAPH, "disable_passes": ["fuse"]})
    names = [str(node.target) for node in fused.graph_module.graph.nodes]
    for name in ("fused_quantize", "linear_quantize", "fused_linear"):
        assert names.count(f"tahf4_cpu.{name}.default") == 2
    assert relative(fused(x), apart(x)) < 0.02
    right = fused(x)
    for op in (torch.ops.tahf4_cpu.fused_quantize.default,):
        given = ([x], f"v0: {str(dtype)[6:]} = layer_norm(x0, None, None, 1e-05)", None, 64)
        torch.library.opcheck(op, given)
    assert torch.equal(fused(x), right)


def test_a_graph_for_these_kernels_runs_where_there_are_none(monkeypatch):
    model, x = torch.nn.Sequential(*(Block() for _ in range(2))).eval(), torch.randn(3, 128)
    fused = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    right = fused(x)
    monkeypatch.setenv("TAHF4_CPU_ISA", "none")
    assert relative(fused(x), right) < 0.02
    monkeypatch.setenv("TAHF4_NO_CPP", "1")
    assert relative(fused(x), right) < 0.02
