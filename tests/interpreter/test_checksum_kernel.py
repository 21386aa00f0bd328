"""The kernel of checksums in Triton's interpreter, bit for bit the reference."""

import pytest
import torch
from tahf4_compiler.backends import triton

from tahf4_compiler.weights import checksum


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(3, 5),
        torch.randn(300, 512),  # several programs, the last one not whole
        torch.randn(4096 * 16 * 2),
        torch.randn(7, 33).to(torch.bfloat16),  # not whole words
        torch.randn(101, dtype=torch.float16)[1:],  # not aligned to words
        torch.randint(0, 255, (4097,), dtype=torch.uint8)[4:],
        torch.empty(0, 64),
        torch.full((64, 64), -1, dtype=torch.int32),
    ],
)
def test_a_checksum_is_that_of_the_reference(values):
    other = values.clone()
    if other.numel():
        other.view(-1)[-1] += 1
    data = [checksum._bytes(value) for value in (values, other)]
    found = triton.checksums(data, checksum._lane_factors(torch.device("cpu")))
    assert found == [int(checksum._sum(part)) for part in data]
    assert not values.numel() or found[0] != found[1]
