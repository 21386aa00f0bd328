"""Cards, and what Wan2.2 needs on them: computed from rates and shapes."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.tools.kernels import memory
from tahf4_compiler.tools.kernels.chips import CHIPS, chip_of
from tahf4_compiler.tools.kernels.roofline import linears_ratio
from tahf4_compiler.tools.kernels.wan import A14B


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_chip_is_found_by_its_name_and_no_other(device, name):
    found = chip_of(device)
    assert (found.name if found else None) == name


def test_chips_take_the_path_of_their_capability_and_name_their_source(monkeypatch):
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "int8")  # of this process, not of the table
    assert {chip.name for chip in CHIPS if chip.path == "bf16"} == {"B200"}
    assert all(chip.source and chip.bf16 < chip.int8 for chip in CHIPS)


def test_linears_gain_most_where_int8_is_four_times_bfloat16():
    gains = {chip.name: linears_ratio(A14B, chip) for chip in CHIPS}
    cards = {name for name in gains if name.startswith("RTX")}
    assert min(gains[name] for name in cards) > 3 > 2 > max(gains[name] for name in gains if name not in cards)
    assert max(gains.values()) <= 4


@pytest.mark.slow
def test_packed_models_have_the_bytes_of_the_format():
    plain, packed = memory.parts(False), memory.parts(True)
    linears = A14B.layers * (8 * A14B.dim**2 + 2 * A14B.dim * A14B.ffn)
    saved = linears * (2 - 36 / 64)
    assert plain.expert - packed.expert == pytest.approx(saved, rel=1e-3)  # less the multipliers
    assert packed.text < plain.text / 2 and packed.vae == plain.vae


def test_the_most_bytes_at_once_are_counted():
    with memory.PeakBytes() as mode:
        x = torch.empty(1000, dtype=torch.uint8, device="meta")
        y = x + 1
        del x
        z = y.view(10, 100)[2:]  # the memory of another
        del y
        w = z + 1
    assert mode.peak == 2000 and w.nbytes == 800
