"""The C++ kernels of the CPU: the same bits as the reference, for everything that a tensor may hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tahf4_compiler.backends import cpu

from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIALS = [
    *(0.0, -0.0, 1.0, -1.0, 7.0, 1e20, -1e20, 3.4e38, -3.4e38, 49152.0, 7 * 49152.0, 65504.0),
    *(1e-45, -1e-45, 1e-40, -1e-39, 1.1754944e-38, 2.0**-50, 2.0**-51, -(2.0**-48), 6e-8, 1e-7),
]
NONFINITE = [float("inf"), float("-inf"), float("nan")]
compiled = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


def assert_same(x, multiplier=None, block=0):
    codes, scales = cpu.quantize(x, multiplier, block)
    right = torch.ops.tahf4.quantize(x, multiplier, block)
    assert codes.shape == right[0].shape
    assert scales.shape == right[1].shape
    assert torch.equal(scales, right[1])
    assert torch.equal(codes, right[0])
    back = cpu.dequantize(codes, scales)
    plain = hif4.dequantize(hif4.Packed(codes, scales, scales.shape[-1] * 64))
    assert torch.equal(back.view(torch.int32), plain.view(torch.int32))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 100, 192, 640])
def test_conversion_is_bit_exact(dtype, k):
    x, multiplier = torch.randn(9, k).to(dtype), torch.randn(k)
    for block in (0, 1, 2, 4, 8, 16, 32, 64):
        assert_same(x, None, block)
        assert_same(x, multiplier, block)


@compiled
@pytest.mark.parametrize(("k", "block"), [(128, 128), (100, 128), (1000, 1024), (1000, 512), (5120, 1024), (65, 128)])
def test_rotations_wider_than_a_unit(k, block):
    for dtype in DTYPES:
        assert_same(torch.randn(5, k).to(dtype), torch.rand(k) + 0.5, block)
        assert_same(torch.randn(5, k).to(dtype) * 1e3, None, block)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    generator = torch.Generator().manual_seed(1)
    pool = torch.tensor(SPECIALS + NONFINITE, dtype=torch.float64).to(dtype)
    finite = torch.tensor(SPECIALS, dtype=torch.float64).to(dtype)
    zero = torch.zeros(1, dtype=dtype)
    for values in (pool, finite, finite[finite.abs() < 1e-6], zero, -zero):
        for density in (0.02, 0.5, 1.0):
            x = torch.randn(200, 130, generator=generator).to(dtype)
            chosen = values[torch.randint(len(values), x.shape, generator=generator)]
            x = torch.where(torch.rand(x.shape, generator=generator) < density, chosen, x)
            for block in (0, 2, 64):
                assert_same(x, None, block)
                assert_same(x, torch.randn(130, generator=generator), block)


@compiled
def test_a_multiplier_that_overflows_or_is_no_number():
    x = torch.randn(20, 128)
    for value in (3e38, float("inf"), float("nan"), 0.0, -0.0, 1e-45):
        multiplier = torch.ones(128)
        multiplier[70] = value
        for block in (0, 64, 128):
            assert_same(x * 1e3, multiplier, block)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    assert_same(bits.view(-1, 64))
    assert_same(bits.view(-1, 1))
    assert_same(bits[torch.randperm(1 << 16)].view(-1, 256), torch.randn(256), 64)


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_random_bits(seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (3000, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    finite = torch.where((bits & 0x7F800000) == 0x7F800000, bits & 0x3FFFFFFF, bits)
    assert_same(bits.view(torch.float32))
    assert_same(finite.view(torch.float32), torch.randn(64, generator=generator), 64)
    # One exponent to a unit, so that every value of it is near a rounding boundary of some kind.
    narrow = (finite & ~0x7F800000) | (torch.randint(1, 255, (3000, 1), generator=generator, dtype=torch.int32) << 23)
    narrow = narrow - (torch.randint(0, 5, bits.shape, generator=generator, dtype=torch.int32) << 23)
    assert_same(narrow.view(torch.float32))
    assert_same(narrow.bitwise_and(-(1 << 19)).view(torch.float32))  # few mantissa bits: many ties


@compiled
def test_strides_leading_axes_and_empty_tensors():
    x = torch.randn(6, 5, 256)
    for view in (x, x.transpose(0, 1), x[..., ::2], x[::2, :, 3:131], x.expand(2, 6, 5, 256), x[0, 0], x[:, :1, 7:]):
        assert_same(view)
        assert_same(view.to(torch.bfloat16), torch.rand(view.shape[-1]), 64)
    assert_same(x[:, 0].T)
    assert_same(x[:1, 0, :1].expand(4, 100))
    assert_same(torch.randn(3, 1).T, None, 64)
    assert_same(x, torch.rand(512)[::2])
    for shape in ((0, 64), (3, 0), (0, 0), (2, 0, 5)):
        assert_same(torch.zeros(shape))


@compiled
def test_units_that_do_not_come_from_a_tensor_convert_back_as_the_reference_does():
    codes = torch.randint(0, 256, (512, 32), dtype=torch.uint8)
    scales = torch.randint(-(1 << 31), 1 << 31, (512, 1), dtype=torch.int64) & ~0xFF | torch.arange(512)[:, None] % 256
    scales = scales.to(torch.int32)
    right = hif4.dequantize(hif4.Packed(codes, scales, 64)).view(torch.int32)
    assert torch.equal(cpu.dequantize(codes, scales).view(torch.int32), right)
    assert torch.equal(cpu.dequantize(codes[::2], scales[::2]).view(torch.int32), right[::2])


def reference_histogram(x):
    """Return counts, maxima, squares and the number of non-finite values in plain PyTorch."""
    x = x.reshape(-1, x.shape[-1]).to(torch.float32)
    finite = x.isfinite()
    magnitude = torch.where(finite, x, 0.0).abs()
    bits = magnitude.view(torch.int32)
    bucket = torch.where(magnitude < 2**-10, 0, 1 + (bits >> 21) - ((127 - 10) << 2))
    bucket = torch.where(magnitude >= 2**14, 97, bucket)
    counts = torch.nn.functional.one_hot(bucket.long(), 98) * finite[..., None]
    return (
        counts.sum(0).to(torch.int32),
        magnitude.amax(0) if len(x) else torch.zeros(x.shape[1]),
        magnitude.double().square().sum(0),
        (~finite).sum()[None],
    )


def empty_histogram(channels):
    return (
        torch.zeros(channels, cpu.BUCKETS, dtype=torch.int32),
        torch.zeros(channels),
        torch.zeros(channels, dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
    )


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 63, 64, 65, 192, 200])
def test_histogram_is_that_of_plain_pytorch(dtype, channels):
    spread = torch.exp2(torch.randn(4, 75, channels) * 8)
    x = (torch.randn(4, 75, channels) * spread).to(dtype)
    special = torch.tensor(SPECIALS + NONFINITE + [2.0**-10, 2.0**14, 0.99999 * 2**14, 2.0**-10 * 0.999]).to(dtype)
    x = torch.where(torch.rand(x.shape) < 0.02, special[torch.randint(len(special), x.shape)], x)
    found = empty_histogram(channels)
    for part in (x, x.transpose(0, 1), x[:0], x[:, ::3]):
        cpu.histogram(part, *found)
    first, thirds = reference_histogram(x), reference_histogram(x[:, ::3])
    assert torch.equal(found[0], 2 * first[0] + thirds[0])
    assert torch.equal(found[1], first[1])
    assert torch.allclose(found[2], 2 * first[2] + thirds[2], rtol=1e-12, atol=0)
    assert torch.equal(found[3], 2 * first[3] + thirds[3])
    assert int(found[0].sum() + found[3]) == 2 * x.numel() + x[:, ::3].numel()


@compiled
@pytest.mark.usefixtures("_threads")
def test_the_number_of_threads_changes_nothing():
    x = torch.randn(700, 1000)
    multiplier = torch.rand(1024)[:1000]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found = empty_histogram(1000)
        cpu.histogram(x, *found)
        packed = (*cpu.quantize(x), *cpu.quantize(x, multiplier, 64), *cpu.quantize(x, None, 512))
        results.append((*found, *packed, cpu.dequantize(*packed[:2])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_several_python_threads_at_once():
    inputs = [torch.randn(300, 192) for _ in range(8)]
    right = [torch.ops.tahf4.quantize(x, None, 64) for x in inputs]

    def work(i):
        found = empty_histogram(192)
        for _ in range(5):
            packed = cpu.quantize(inputs[i], None, 64)
            cpu.histogram(inputs[i], *found)
        return packed, found

    with ThreadPoolExecutor(8) as pool:
        for i, (packed, found) in enumerate(pool.map(work, range(8))):
            assert all(torch.equal(a, b) for a, b in zip(packed, right[i], strict=True))
            assert torch.equal(found[0], 5 * reference_histogram(inputs[i])[0])


@compiled
def test_loading_the_library_leaves_subnormal_numbers_alone():
    assert float(torch.tensor(1e-40) * 0.5) > 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: float(torch.tensor(1e-40) * 0.5)).result() > 0


@compiled
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.quantize(torch.ones(2, 64, dtype=torch.float64)), "expected float32, bfloat16 or float16"),
        (lambda: cpu.quantize(torch.tensor(1.0)), "without axes"),
        (lambda: cpu.quantize(torch.ones(2, 64, device="meta")), "on meta; expected one on the CPU"),
        (lambda: cpu.quantize(torch.ones(2, 64), torch.ones(63)), "multiplier of shape"),
        (lambda: cpu.quantize(torch.ones(2, 64), torch.ones(64, dtype=torch.float64)), "multiplier of torch.float64"),
        (lambda: cpu.quantize(torch.ones(2, 64), None, 48), "power of two that divides 64"),
        (lambda: cpu.dequantize(torch.ones(2, 32), torch.ones(2, 1)), "expected uint8 and int32"),
        (lambda: cpu.dequantize(torch.ones(2, 33).byte(), torch.ones(2, 1).int()), "expected last axes"),
        (lambda: cpu.histogram(torch.ones(2, 63), *empty_histogram(64)), "counts of torch.int32 and shape"),
        (lambda: cpu.histogram(torch.ones(2, 64).long(), *empty_histogram(64)), "expected float32"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(FormatError, match=message):
        call()


@compiled
@pytest.mark.parametrize("count", [1, 2, 4095, 4096, 4097, 3 * 4096 + 5, 257 * 4096, 1 << 21])
def test_the_checksum_of_weights_is_that_of_plain_pytorch(count, monkeypatch):
    from tahf4_compiler.weights.checksum import checksum

    ones = -torch.ones(count)
    for weight in (torch.randn(count), torch.randn(count).bfloat16(), torch.randn(2, count)[:, ::2], ones):
        found = checksum(weight)
        monkeypatch.setenv("TAHF4_NO_CPP", "1")
        assert torch.equal(found, checksum(weight)) and found.dtype == torch.int64 and found.dim() == 0
        monkeypatch.setenv("TAHF4_NO_CPP", "0")
