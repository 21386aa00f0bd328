"""Cards that people have, and what they do at most."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...backends.triton.tiling import path_of_many

__all__ = ["CHIPS", "Chip", "chip_of"]

MANY = 1 << 15


@dataclass(frozen=True)
class Chip:
    """What a chip does at most: dense rates, with sums in float32 (bfloat16) and int32 (int8), as the kernels have.

    Attributes:
        name: of the chip.
        device: pattern of the name that CUDA gives it.
        capability: of its computations.
        memory: GB.
        bandwidth: bytes a second.
        bf16: operations a second of the matrix units.
        int8: the same.
        lanes: instructions a second, over all lanes: half of the float32 operations, of which a fused multiply-add is
            two. GeForce cards before Blackwell, and L40S, have integers on half of their lanes, which is not counted.
        source: of the rates.
    """

    name: str
    device: str
    capability: tuple[int, int]
    memory: float
    bandwidth: float
    bf16: float
    int8: float
    lanes: float
    source: str

    @property
    def path(self) -> str:
        """How products of many rows are computed by default."""
        return path_of_many(self.capability)


_GEFORCE = r"RTX {}(?! Ti| D| Laptop)\b"

CHIPS = (
    Chip("RTX 3090", _GEFORCE.format(3090), (8, 6), 24, 0.936e12, 71e12, 284e12, 17.8e12,
        "NVIDIA Ampere GA102 GPU Architecture, V2.0, appendix A"),
    Chip("RTX 4090", _GEFORCE.format(4090), (8, 9), 24, 1.008e12, 165.2e12, 660.6e12, 41.3e12,
        "NVIDIA Ada GPU Architecture, V2.01, appendix A"),
    Chip("RTX 5090", _GEFORCE.format(5090), (12, 0), 32, 1.792e12, 209.5e12, 838e12, 52.4e12,
        "NVIDIA RTX Blackwell GPU Architecture, V1.1, appendix A"),
    Chip("L40S", r"\bL40S\b", (8, 9), 48, 0.864e12, 362e12, 733e12, 45.8e12, "NVIDIA L40S data sheet"),
    Chip("A100 80 GB", r"A100-SXM4-80GB", (8, 0), 80, 2.039e12, 312e12, 624e12, 9.75e12, "NVIDIA A100 data sheet"),
    Chip("H100 SXM", r"\bH100 80GB HBM3\b", (9, 0), 80, 3.35e12, 989e12, 1979e12, 33.5e12, "NVIDIA H100 data sheet"),
    Chip("H200", r"\bH200(?! NVL)\b", (9, 0), 141, 4.8e12, 989e12, 1979e12, 33.5e12, "NVIDIA H200 data sheet"),
    Chip("B200", r"\bB200\b", (10, 0), 180, 8.0e12, 2250e12, 4500e12, 40e12, "NVIDIA HGX B200 data sheet"),
)  # fmt: skip


def chip_of(device: str) -> Chip | None:
    """Return the chip of a device by the name that CUDA gives it; None if it is not listed."""
    if "MIG" in device.split():  # a part of a chip
        return None
    return next((chip for chip in CHIPS if re.search(chip.device, device)), None)
