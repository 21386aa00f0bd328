"""How far forms of one packed model agree: `python -m tahf4_compiler.tools.evaluation.packed_agreement`.

Calls the first expert of the shipped pipeline, packed, in float32: eager, compiled with tahf4, and beside them a
reference whose linears multiply the same codes in float64. Where no code of an activation moves, they differ by
float32's last bits; where one does, by as much as the quantization itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...format import hif4
from ...format.transforms import transform
from ...packed.convert import quantize_
from ...packed.linear import HiF4Linear
from ..generation import load_pipeline
from ..tiny_wan import settings

__all__ = ["Reference", "main"]

CALLS = 12


class Reference(nn.Module):
    """A packed linear that quantizes in float32 and multiplies in float64."""

    def __init__(self, packed: HiF4Linear) -> None:
        """Take the codes of a packed linear; it stays as it is."""
        super().__init__()
        self.multiplier, self.block = packed.multiplier, packed.hadamard_block
        self.k = hif4.units(packed.in_features) * hif4.UNIT
        codes = hif4.Packed(packed.weight_codes.detach(), packed.weight_scales.detach(), self.k)
        self.weight = nn.Parameter(hif4.dequantize(codes, torch.float64), requires_grad=False)
        self.bias = packed.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return float64 ``[..., N]``."""
        multiplier = None if self.multiplier is None else self.multiplier.to(torch.float32)
        left = hif4.quantize(transform(x.to(torch.float32), multiplier, self.block))
        wide = hif4.dequantize(hif4.Packed(left.codes, left.scales, self.k), torch.float64)
        return nn.functional.linear(wide, self.weight, self.bias)


def _inputs(model: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, config.in_channels, 5, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([500.0 + 37 * seed]),
        "encoder_hidden_states": torch.randn(1, 16, config.text_dim, generator=generator).to(dtype),
        "return_dict": False,
    }


def _distance(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def main() -> None:
    """Print the relative distances for each call."""
    plain = load_pipeline(settings.PIPELINE_DIR, torch.float32, "cpu").transformer.eval().requires_grad_(False)
    packed = copy.deepcopy(plain)
    quantize_(packed)
    reference = copy.deepcopy(packed)
    for path, module in list(reference.named_modules()):
        if isinstance(module, HiF4Linear):
            parent, _, name = path.rpartition(".")
            setattr(reference.get_submodule(parent), name, Reference(module))
    nn.Module.to(reference, torch.float64)  # diffusers refuses to cast a packed model
    forms: dict[str, Any] = {"eager": packed}
    for name, model in (("tahf4", packed), ("plain, tahf4", plain)):
        forms[name] = torch.compile(copy.deepcopy(model), backend="tahf4", options={"inductor": False})
    print("relative distances: eager and tahf4 from float64, eager from tahf4, packed from plain")
    with torch.no_grad():
        for seed in range(CALLS):
            wanted = reference(**_inputs(plain, seed, torch.float64))[0]
            given = _inputs(plain, seed, torch.float32)
            got = {name: form(**given)[0] for name, form in forms.items()}
            print(
                f"{seed:2d}  {_distance(got['eager'], wanted):.1e}  {_distance(got['tahf4'], wanted):.1e}  "
                f"{_distance(got['eager'], got['tahf4']):.1e}  {_distance(got['tahf4'], got['plain, tahf4']):.1e}"
            )


if __name__ == "__main__":
    main()
