"""Sketches keep their promises: exact counts and maxima, bounded quantile error, merging by addition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tahf4_compiler.calibration.sketch import BUCKETS, RELATIVE_ERROR, SMALLEST, RowSample, Sketch


def data(rows: int = 5000, channels: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator) * torch.tensor([1e-2, 0.1, 1.0, 10.0, 100.0, 3000.0])
    x[3, 2], x[4, 2] = 900.0, -1000.0
    return x


def sketched(x: torch.Tensor) -> Sketch:
    sketch = Sketch(x.shape[-1])
    sketch.update(x)
    return sketch


@pytest.fixture(params=["kernel", "reference"])
def implementation(request, monkeypatch):
    from tahf4_compiler.backends import cpu

    if request.param == "reference":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("percent", [0.5, 50.0, 90.0, 99.0, 99.9, 99.99])
def test_percentiles_are_within_the_relative_error(percent):
    x = data()
    found = sketched(x).percentile(percent)
    wanted = torch.from_numpy(np.percentile(x.abs().numpy(), percent, axis=0, method="inverted_cdf"))
    inside = wanted > SMALLEST
    assert ((found - wanted).abs()[inside] <= RELATIVE_ERROR * (1 + 1e-5) * wanted[inside]).all()
    assert (found[~inside] <= SMALLEST).all()
    assert inside.sum() > 3


@pytest.mark.usefixtures("implementation")
def test_counts_maxima_and_moments_are_exact():
    x = data()
    sketch = sketched(x)
    assert sketch.rows == len(x)
    assert torch.equal(sketch.counts.sum(1), torch.full((6,), len(x)))
    assert torch.equal(sketch.maxima, x.abs().amax(0))
    assert torch.equal(sketch.percentile(100), x.abs().amax(0))
    assert torch.allclose(sketch.second_moment(), x.double().square().mean(0).float())
    assert sketch.counts.shape == (6, BUCKETS)


@pytest.mark.usefixtures("implementation")
def test_the_extremes_have_buckets_and_what_is_not_finite_is_counted_apart():
    x = torch.tensor([[0.0], [1e-20], [SMALLEST], [2.0**14], [1e30], [torch.nan], [-torch.inf]])
    sketch = sketched(x)
    assert sketch.counts[0, 0] == 2
    assert sketch.counts[0, 1] == 1
    assert sketch.counts[0, -1] == 2
    assert int(sketch.nonfinite) == 2
    assert float(sketch.maxima) == pytest.approx(1e30)
    assert float(sketch.percentile(99)) == pytest.approx(1e30)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parts_merge_to_the_whole(dtype):
    x = data().clamp(-6e4, 6e4).to(dtype)
    whole, parts = sketched(x), sketched(x[:1234])
    parts.merge(sketched(x[1234:].reshape(2, -1, 6)))
    for name, value in whole.tensors().items():
        if name == "squares":  # a sum of floating-point numbers depends on the order
            assert torch.allclose(value, parts.tensors()[name])
        else:
            assert torch.equal(value, parts.tensors()[name]), name
    again = Sketch.from_tensors(whole.tensors())
    assert torch.equal(again.percentile(99.9), whole.percentile(99.9))


def test_too_many_rows_are_refused():
    sketch = sketched(data(10))
    sketch.rows = 2**31 - 5
    with pytest.raises(OverflowError, match=r"2\*\*31"):
        sketch.update(data(10))
    with pytest.raises(OverflowError):
        sketch.merge(sketched(data(10)))


def test_a_sample_is_uniform_bounded_and_repeatable():
    counts = torch.zeros(1000)
    for name in range(300):
        sample = RowSample(20, str(name))
        for part in torch.arange(1000.0)[:, None].split(130):
            sample.update(part)
        assert len(sample.rows) == 20
        counts[sample.rows[:, 0].long()] += 1
    # 20 of 1000 rows in 300 samples: 6 on average; early and late rows alike.
    halves = counts.view(2, 500).sum(1)
    assert abs(float(halves[0] / halves.sum()) - 0.5) < 0.03
    assert counts.max() < 30

    again = [RowSample(20, "a") for _ in range(2)]
    for sample in again:
        for part in torch.arange(5000.0)[:, None].split(999):
            sample.update(part)
    assert torch.equal(again[0].rows, again[1].rows)


def test_samples_merge_to_the_largest_priorities():
    left, right = RowSample(8, "left"), RowSample(8, "right")
    left.update(torch.arange(100.0)[:, None])
    right.update(torch.arange(100.0, 200.0)[:, None])
    wanted = torch.cat((left.priorities, right.priorities)).sort(descending=True).values[:8]
    left.merge(right)
    assert torch.equal(left.priorities, wanted)
    loaded = RowSample(8, "left")
    loaded.load(left.tensors())
    for sample in (left, loaded):
        sample.update(torch.randn(50, 1, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(left.rows, loaded.rows)


def test_a_sample_does_not_depend_on_who_saw_what():
    x = torch.randn(2, 3, 40, 1, generator=torch.Generator().manual_seed(0))  # inputs, calls, rows
    whole = RowSample(16, "a")
    for source, calls in zip("pq", x):
        for call in calls:
            whole.update(call[None], source)

    by_input = [RowSample(16, "a") for _ in "pq"]
    for i in (1, 0):
        for call in x[i]:
            by_input[i].update(call[None], "pq"[i])
    by_sequence = [RowSample(16, "a") for _ in range(2)]
    for part, sample in enumerate(by_sequence):
        for source, calls in zip("pq", x):
            for call in calls:
                sample.update(call[None, 20 * part : 20 * (part + 1)], source, 20 * part)

    for parts in (by_input, by_sequence, by_sequence[::-1]):
        left, right = copy.deepcopy(parts)
        left.merge(right)
        assert torch.equal(left.rows, whole.rows)
        assert torch.equal(left.priorities, whole.priorities)
