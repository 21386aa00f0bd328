"""Generated kernels compiled for GPUs that are not here: registers, shared memory, matrix instructions, loads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") == "1",
    reason="needs Triton's compiler",
)

from tahf4_compiler.backends import triton as backend  # noqa: E402
from tahf4_compiler.backends.triton import source  # noqa: E402

from tahf4_compiler import FormatError  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TAHF4_KERNEL_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


KINDS = (
    "ffn 1, GELU -> quantize: product", "attn1 output -> quantize", "codes to int8",
    "attn1 out, gate, residual: part of a product (few rows)", "attn1 out, gate, residual: sum of the parts (few rows)",
    "attention in 8 bits: v -> quantize", "attention in 8 bits: rows through all keys",
)  # fmt: skip
"""One kernel of each kind, where others differ in a program of a few statements or in a size: what each run has."""


def listed():
    """Every product on each architecture. Kernels that only quantize take Triton longest, and their text is the same on
    all architectures: each on one of them, for many rows, and one with many registers on all.
    """
    from tahf4_compiler.tools.kernels.table import entries

    found, texts = [], {}
    for capability in (90, 80, 100, 86, 89, 120):
        for i, entry in enumerate(entries(capability)):
            if entry.name.split(" (")[0].endswith("-> quantize"):
                assert texts.setdefault(entry.name, entry.call.text) == entry.call.text
                if "few rows" in entry.name or (capability != 90 and entry.name != "norm1, modulation -> quantize"):
                    continue
            quick = capability == 90 and entry.name in KINDS
            found.append(pytest.param(capability, i, marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize("capability, index", listed())
def test_the_kernels_of_wan_fit_the_chip(capability, index):
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call
    from tahf4_compiler.tools.kernels.table import entries

    entry = entries(capability)[index]
    found = compile_call(entry.call, capability)
    print(entry.name, found)
    # Triton 3.9 keeps some numbers of products for few rows on a stack of 16 bytes, with registers to spare. Triton 3.6
    # keeps part of attention's accumulator there.
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    few = version >= (3, 9) and "few rows" in entry.name and found.stack <= 16 and found.registers < 128
    assert found.spills == 0 or few or (version < (3, 7) and entry.call.name == "attend")
    assert found.registers <= 255
    assert found.shared <= SHARED_LIMIT[capability]
    counts, text = found.counts, entry.call.text
    if entry.call.name == "attend":
        assert counts["wgmma" if capability == 90 else "mma"] > 0
    elif "tl.dot" in text and entry.call.name not in ("finish", "quantize_values"):
        large = entry.call.constants["BM"] >= 64
        wanted = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma") if large else "mma"
        assert counts[wanted] > 0
    elif "store_hif4" in text:
        assert counts["shuffles"] <= 8 and counts["stores of 16 bytes"] >= 2
        per_token = any(name.endswith("_length") or name == "x1_stride" for name in entry.call.arguments)
        assert counts["loads of 16 bytes"] == counts["loads"] or per_token or "span_maximum" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "quantized"),
    [
        (c, d, m, q)
        for c in (90, 80, 100, 120)
        for d in (torch.bfloat16, torch.float32)
        for m in (1, 32760)
        for q in (False, True)
    ],
)
def test_a_branch_of_low_rank_stays_in_registers(capability, dtype, rows, quantized):
    from tahf4_compiler.backends.triton import linear
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = (empty(rows, 2560, dtype=torch.uint8), empty(rows, 80, dtype=torch.int32))
    operands += (empty(5120, 2560, dtype=torch.uint8), empty(5120, 80, dtype=torch.int32), empty(5120), dtype, [5120])
    name = str(dtype)[6:]
    program = f"v0: {name} = matmul(x0, x1)\nv1: {name} = add(y, v0)\nv2: {name} = gelu_tanh(v1)"
    args = (*operands, [empty(rows, 32), empty(32, 5120)], program, None if quantized else dtype)
    _, calls = linear.calls(*args, capability=(capability // 10, capability % 10), processors=132)
    found = compile_call(calls[-1], capability)
    # One kernel keeps a few numbers elsewhere; docs/limits.md says so.
    known = (capability, dtype, rows, quantized) == (90, torch.float32, 32760, False)
    assert found.spills <= (16 if known else 0)
    assert found.registers <= 255 and found.shared <= SHARED_LIMIT[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("span", [4, 0])
def test_products_over_a_span_stay_in_registers(capability, span):
    """What is not among the kernels of Wan: four units, a row in the widest tile, and a result that is quantized."""
    from tahf4_compiler.backends.triton import linear, tiling
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, n = 32760, 5120
    operands = (empty(rows, 2560, dtype=torch.uint8), empty(rows, 80, dtype=torch.int32))
    operands += (empty(n, 2560, dtype=torch.uint8), empty(n, 80, dtype=torch.int32), empty(n), torch.bfloat16)
    branch = "v0: bfloat16 = matmul(x0, x1)\nv1: bfloat16 = add(y, v0)"
    several = ([2560, 1280, 1280], [], "", torch.bfloat16)
    quantized = ([n], [], "v0: bfloat16 = gelu_tanh(y)", None, empty(n, dtype=torch.float32), 64)
    added = ([n], [empty(rows, 32), empty(32, n)], branch, torch.bfloat16)
    where = {"capability": divmod(capability, 10), "processors": 132, "path": "int8", "span": span}
    wide = tiling.Tile(128, 256, 8, 3) if span == 0 else None
    for after, tile in ((several, wide), (quantized, None), *([] if span == 0 else [(added, None)])):
        found = compile_call(linear.calls(*operands, *after, tile=tile, **where)[1][-1], capability)
        print(after[2], tile, found)
        assert found.spills == 0 and found.shared <= SHARED_LIMIT[capability]
        assert found.counts["wgmma" if capability == 90 else "mma"] > 0


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 86, 89, 100, 120))]
)
def test_what_follows_the_product_of_the_library_stays_in_registers(capability):
    from tahf4_compiler.backends.triton import linear
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, n = 32760, 5120
    operands = (empty(rows, 2560, dtype=torch.uint8), empty(rows, 80, dtype=torch.int32))
    operands += (empty(n, 2560, dtype=torch.uint8), empty(n, 80, dtype=torch.int32), empty(n), torch.bfloat16)
    gate = "v0: bfloat16 = mul(y, x0)\nv1: bfloat16 = add(x1, v0)"
    gated = ([n], [empty(n), empty(rows, n)], gate, torch.bfloat16)
    several = ([2560, 1280, 1280], [], "", torch.bfloat16)
    branch = "v0: bfloat16 = matmul(x0, x1)\nv1: bfloat16 = add(y, v0)"
    added = ([n], [empty(rows, 32), empty(32, n)], branch, torch.bfloat16)
    quantized = ([n], [], "v0: bfloat16 = gelu_tanh(y)", None, empty(n, dtype=torch.float32), 64)
    where = {"capability": divmod(capability, 10), "processors": 132, "path": "library", "span": 0}
    for after in (gated,) if capability == 90 else (gated, several, added, quantized):
        expand_left, expand_right, call = linear.calls(*operands, *after, **where)[1]
        assert "out_scales" in expand_left.arguments and "out_scales" in expand_right.arguments
        assert [tuple(part.shape) for part in call.product] == [(rows, 5120), (n, 5120), (rows, n)]
        found = compile_call(call, capability)
        print(after[2], found)
        assert found.spills == 0 and found.registers <= 128 and found.shared <= SHARED_LIMIT[capability]
        assert found.counts["loads of 16 bytes"] >= 8  # 32 of a thread's dots


@pytest.mark.parametrize(
    ("path", "bits", "units", "shared"),
    [
        *(("int8", 4, 5, True), ("int8", 4, 6, False), ("int8", 4, 0, False)),
        *(("int8", 8, 5, False), ("packed", 4, 5, False), ("bf16", 4, 5, False)),
    ],
)
def test_which_products_add_integers_over_a_row(path, bits, units, shared, monkeypatch):
    """Not those of other paths or of activations of 8 bits, nor rows whose dot may not fit into 32 bits, or is none."""
    from tahf4_compiler.backends.triton import linear

    monkeypatch.setattr(linear, "MOST_UNITS", 5)

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    left = (empty(3, 32 * units, dtype=torch.uint8), empty(3, units))
    left = left if bits == 4 else (empty(3, 64 * units, dtype=torch.int8), empty(3, units, dtype=torch.float32))
    args = (*left, empty(9, 32 * units, dtype=torch.uint8), empty(9, units), None, torch.float32, [9], [], "")
    where = {"capability": (9, 0), "processors": 132, "path": path}
    texts = [linear.calls(*args, torch.float32, span=span, **where)[1][-1].text for span in (0, 1)]
    assert (texts[0] != texts[1]) == shared


@pytest.mark.parametrize(
    ("rows", "n", "units", "bits", "span", "fits"),
    [
        (17, 8, 5, 4, 0, True), (16, 8, 5, 4, 0, False), (17, 12, 5, 4, 0, False), (17, 8, 6, 4, 0, False),
        (17, 8, 5, 8, 0, False), (17, 8, 5, 4, 1, False), (17, 8, 5, 4, 4, False),
    ],
)  # fmt: skip
def test_which_products_the_library_multiplies(rows, n, units, bits, span, fits, monkeypatch):
    """Of 4 bits with a scale a row, with more than 16 rows and columns in eights, whose dots fit into 32 bits."""
    from tahf4_compiler.backends.triton import linear

    monkeypatch.setattr(linear, "MOST_UNITS", 5)
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "library")

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    left = (empty(rows, 32 * units, dtype=torch.uint8), empty(rows, units))
    left = left if bits == 4 else (empty(rows, 64 * units, dtype=torch.int8), empty(rows, units, dtype=torch.float32))
    args = (*left, empty(n, 32 * units, dtype=torch.uint8), empty(n, units), None, torch.float32, [n], [], "")
    _, calls = linear.calls(*args, torch.float32, span=span, capability=(9, 0), processors=132)
    assert [call.product is not None for call in calls] == [False] * (len(calls) - 1) + [fits]


def test_factors_that_do_not_fit_are_refused():
    from tahf4_compiler.backends.triton.expressions import operands

    left, right = (torch.empty(*shape, device="meta") for shape in ((2, 3, 8), (8, 64)))
    for wrong in ([left[:1], right], [left, right[:, :5]], [left[..., :4], right], [left, right.half()]):
        with pytest.raises(FormatError, match="expected a factor"):
            operands("v0: float32 = matmul(x0, x1)", wrong, (2, 3, 64))


def test_kernels_that_quantize_have_no_fused_multiply_add():
    """Every operation rounds as in the reference; an FFMA in a rotation would not."""
    from tahf4_compiler.backends.triton import quantize

    x = torch.empty(1, 64, 5120, dtype=torch.bfloat16, device="meta")
    _, (call,) = quantize.call([x], "", torch.empty(5120, device="meta"), 64)
    assert call.exact and call.options()["enable_fp_fusion"] is False
    assert "fma.rn.f32" not in ptx(call)
    for span in (0, 2):
        _, calls = quantize.call([x], "", torch.empty(5120, device="meta"), 64, 4, span)
        assert all(call.exact and call.options()["enable_fp_fusion"] is False for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("span", [0, 2])
def test_kernels_of_a_span_compile_and_have_no_fused_multiply_add(span):
    from tahf4_compiler.backends.triton import quantize

    x = torch.empty(1, 64, 5120, dtype=torch.bfloat16, device="meta")
    _, calls = quantize.call([x], "", torch.empty(5120, device="meta"), 64, 4, span)
    assert len(calls) == 2
    assert all("fma.rn.f32" not in ptx(call) for call in calls)


@pytest.mark.slow
def test_the_scale_of_least_error_stays_in_registers():
    from tahf4_compiler.backends.triton import quantize
    from tahf4_compiler.backends.triton.targets import compile_call

    x = torch.empty(1, 64, 5120, dtype=torch.bfloat16, device="meta")
    _, (call,) = quantize.call([x], "", None, 0, 4, 17)
    found = compile_call(call, 90)
    assert found.spills == found.counts["shuffles"] == 0 and found.registers <= 255


def test_roundings_to_bfloat16_inside_programs_stay():
    from tahf4_compiler.backends.triton import quantize

    x = torch.empty(1, 64, 5120, dtype=torch.bfloat16, device="meta")
    _, (call,) = quantize.call([x], "v0: bfloat16 = silu(x0)", None, 0)
    assert "cvt.rn.bf16" in ptx(call)


def ptx(call, capability=90):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(source.load(call.text), call.name)
    signature, constants = {}, dict(call.constants)
    for name, value in call.arguments.items():
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}[value.dtype]
        else:
            signature[name] = "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    built = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options=call.options(),
    )
    return built.asm["ptx"]


def test_a_generated_file_is_written_once_under_the_hash_of_its_text(tmp_path):
    text = source.module_text("Nothing.", ["round_bits"], "@triton.jit\ndef kernel(x):\n    round_bits(x, 16)")
    first = source.load(text)
    assert source.load(text) is first
    (path,) = tmp_path.glob("k_*.py")
    assert path.read_text() == text and "import tahf4" not in text
    compile(text, str(path), "exec")


def test_a_damaged_file_is_written_again(tmp_path):
    text = source.module_text("Damaged.", [], "@triton.jit\ndef kernel(x):\n    pass")
    source.load(text)
    (path,) = tmp_path.glob("k_*.py")
    path.write_text("half of it")
    source.load.cache_clear()
    source.load(text)
    assert path.read_text() == text


def test_needed_functions_come_with_those_that_they_call():
    text = source.functions_text(["to_hif4"])
    assert all(f"def {name}(" in text for name in ("to_hif4", "elements", "level1_code", "round_bits"))
    assert "def hadamard(" not in text


def test_a_cpu_without_the_interpreter_is_not_served():
    assert "interpreter" in backend.why_not(torch.device("cpu"))
    assert backend.why_not(torch.device("meta")) is not None


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 100, 120])
@pytest.mark.parametrize("rows", [8, 32760])
def test_products_of_activations_in_8_bits_fit_the_chip(capability, rows):
    from tahf4_compiler.backends.triton import linear
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    k, n = 5120, 13824
    sides = (empty(1, rows, k, dtype=torch.int8), empty(1, rows, k // 64, dtype=torch.float32))
    weight = (empty(n, k // 2, dtype=torch.uint8), empty(n, k // 64, dtype=torch.int32))
    after = ([n], [], "v0: bfloat16 = gelu_tanh(y)", None, empty(n, dtype=torch.float32), 64, 8)
    where = {"capability": divmod(capability, 10), "processors": 132}
    _, calls = linear.calls(*sides, *weight, empty(n), torch.bfloat16, *after, **where)
    for call in calls:
        found = compile_call(call, capability)
        print(call.name, found)
        assert found.spills == 0 and found.shared <= SHARED_LIMIT[capability]
        if "tl.dot" in call.text and call.name in ("kernel", "partial") and "BM" in call.constants:
            wanted = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma") if rows > 64 else "mma"
            assert found.counts[wanted] > 0


@pytest.mark.parametrize(
    ("capability", "channels", "causal"),
    [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            *((86, 128, False), (120, 96, True), (89, 128, False), (120, 128, False)),
            *((120, 128, True), (120, 96, False), (86, 64, True)),
        )
    ],
)
def test_attention_in_8_bits_fits_the_chip(capability, channels, causal):
    from tahf4_compiler.backends.triton import attention
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    q = torch.empty(1, 4000, 40, channels, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    found = compile_call(attention.calls(q, q, q, None, causal)[1][-1], capability)
    print(found)
    assert found.spills == 0 and found.shared <= SHARED_LIMIT[capability] and found.counts["mma"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_attention_with_a_log_sum_exp_fits_the_chip(capability):
    from tahf4_compiler.backends.triton import attention
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    q = torch.empty(1, 4000, 40, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    lse = torch.empty(1, 40, 4000, device="meta")
    found = compile_call(attention.calls(q, q, q, lse=lse)[1][-1], capability)
    assert found.spills == 0 and found.shared <= SHARED_LIMIT[capability]
    assert found.counts["mma"] + found.counts["wgmma"] + found.counts["tcgen05"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_attention_with_queries_and_keys_in_hif4_fits_the_chip(capability):
    from tahf4_compiler.backends.triton import attention
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    q = torch.empty(1, 4000, 40, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    _, calls = attention.calls(q, q, q, bits=4)
    assert [call.name for call in calls] == ["kernel", "kernel", "kernel", "kernel", "quantize_values", "attend"]
    for call in (*calls[:2], calls[-1]):  # queries and keys go through the same two kernels
        found = compile_call(call, capability)
        assert found.spills == 0 and found.shared <= SHARED_LIMIT[capability]


@pytest.mark.slow
@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_norms_rotary_embedding_and_quantization_fit_the_chip(capability, value_bits):
    from tahf4_compiler.backends.triton.targets import compile_call
    from tahf4_compiler.tools.kernels.wan import A14B, attention_calls

    version = (capability // 10, capability % 10)
    calls, apart = (attention_calls(A14B, 32760, value_bits, version, how) for how in (True, False))
    assert [call.name for call in calls] == [call.name for call in apart]
    assert calls[-1].constants == apart[-1].constants and calls[-1].text == apart[-1].text
    found = compile_call(calls[0], capability)
    assert found.spills == 0 and found.registers <= 168
    assert found.counts["loads of 16 bytes"] == found.counts["loads"]


@pytest.mark.slow
def test_attention_of_one_query_and_one_key_compiles():
    """Sizes of 1 are constants of Triton, with other types."""
    from tahf4_compiler.backends.triton import attention
    from tahf4_compiler.backends.triton.targets import compile_call

    q = torch.empty(1, 1, 1, 16, dtype=torch.float16, device="meta")
    mask = torch.empty(1, 1, dtype=torch.bool, device="meta")
    for call in (*attention.calls(q, q, q, mask)[1], attention.calls(q, q, q, None, True)[1][-1]):
        assert compile_call(call, 90).spills == 0


@pytest.mark.slow
def test_the_quantization_to_8_bits_keeps_a_unit_in_a_thread():
    from tahf4_compiler.backends.triton import quantize
    from tahf4_compiler.backends.triton.targets import compile_call

    x = torch.empty(1, 32760, 5120, dtype=torch.bfloat16, device="meta")
    _, (call,) = quantize.call([x], "", torch.empty(5120, device="meta"), 64, 8)
    found = compile_call(call, 90)
    assert found.spills == 0 and found.counts["shuffles"] == 0 and found.counts["stores of 16 bytes"] == 4


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 120))])
def test_a_checksum_is_one_launch_that_fits_the_chip(capability):
    from tahf4_compiler.backends.triton import checksum
    from tahf4_compiler.backends.triton.targets import compile_call

    weight = torch.empty(2 * 5120 * 13824, dtype=torch.uint8, device="meta")
    _, (call,) = checksum.calls([weight], torch.empty(4096, dtype=torch.int64, device="meta"))
    found = compile_call(call, capability)
    assert found.spills == 0 and found.registers <= 255 and found.counts["loads of 16 bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 120])
def test_units_of_reconstructed_weights_fit_the_chip(capability):
    from tahf4_compiler.backends.triton import rounding
    from tahf4_compiler.backends.triton.targets import compile_call

    values, square = torch.empty(5120, 64, device="meta"), torch.empty(64, 64, device="meta")
    _, first = rounding.round_unit(values, values, square)
    for call in (first, rounding.descend_unit(values, values, values, square)):
        found = compile_call(call, capability)
        assert found.spills == 0 and found.registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
@pytest.mark.parametrize("value_bits", [8, 16])
def test_attention_with_masks_and_wide_heads_spills_nothing(capability, value_bits):
    from tahf4_compiler.backends.triton import attention
    from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call

    def found(channels, **how):
        q = torch.empty(1, 1024, 4, channels, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        known = {"value_bits": value_bits, "capability": (capability // 10, capability % 10)}
        return compile_call(attention.calls(q, q, q, **known, **how)[1][-1], capability)

    for dtype in (torch.bool, torch.float32):
        for rows in (1, 1024):
            resources = found(128, attn_mask=torch.empty(1, 1, rows, 1024, dtype=dtype, device="meta"))
            assert resources.spills == 0 and resources.shared <= SHARED_LIMIT[capability]
    for resources in (found(256), found(64), found(128, is_causal=True)):
        assert resources.spills == 0 and resources.shared <= SHARED_LIMIT[capability]
