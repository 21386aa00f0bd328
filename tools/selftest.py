"""Quick checks that the number format and the backend work in this environment."""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from ..format import hif4

__all__ = ["check_compile", "check_format", "first_compile"]

# Eight eighths of a unit, all of them values that HiF4 holds: 0 to 7 quarters times 4, -2, 1 and -1, twice.
FACTORS = (4.0, -2.0, 1.0, -1.0, 4.0, -2.0, 1.0, -1.0)

# Worked out by hand. Level-1 scale 1.0 is 0xc0. Subgroups 0 and 4 reach 4, so e8 is 0x11; groups 1, 3, 9 and
# 11 reach 2 after that, so e16 is 0x0a0a. Then two elements a byte, the even one in the low nibble.
EXPECTED = bytes.fromhex("c0110a0a" + 2 * "20645476a8ecdcfe1032547698badcfe")


def check_format() -> str:
    """Convert a fixed vector to HiF4 and back; return what is wrong, or nothing."""
    vector = (torch.tensor(FACTORS)[:, None] * torch.arange(8) / 4).flatten()
    packed = hif4.quantize(vector)
    found = bytes(hif4.to_bytes(packed).tolist())
    if found != EXPECTED:
        return f"a known vector packs to {found.hex()}; expected {EXPECTED.hex()}"
    if not torch.equal(hif4.dequantize(packed), vector):
        return "a vector that HiF4 holds exactly is another one after conversion and back"
    return ""


def check_compile() -> str:
    """Compile a linear layer and compare it with its definition; return what is wrong, or nothing."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(128, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(3, 128, generator=generator)
        found = torch.compile(model, backend="tahf4", options={"inductor": False, "rotate.block": 0})(x)
        expected = hif4.fake_quantize(x) @ hif4.fake_quantize(model.weight).T + model.bias
        if torch.allclose(found, model(x), atol=1e-6):
            return "the compiled layer gives the result of the original: nothing ran in 4 bits"
    error = (found - expected).abs().max().item()
    if not error < 1e-3:
        return f"the compiled layer is off by {error:.3g} from the product of the 4-bit values"
    return ""


def first_compile(folder: Path) -> str:
    """Compile the blocks of a Wan transformer in a folder and call it once; return the seconds and where they went."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder).eval()
    channels, text = model.config.in_channels, model.config.text_dim
    given = torch.zeros(1, channels, 2, 8, 8), torch.tensor([500]), torch.zeros(1, 12, text)
    stages: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as dump, torch.no_grad():
        model.compile_repeated_blocks(backend="tahf4", options={"dump_dir": dump})
        start = time.perf_counter()
        model(hidden_states=given[0], timestep=given[1], encoder_hidden_states=given[2])
        took = time.perf_counter() - start
        for path in Path(dump).rglob("report.txt"):
            for line in re.findall("compile time: (.*)", path.read_text()):
                for name, seconds in re.findall(r"([a-z ]+) ([\d.]+) s", line):
                    stages[name.strip()] += float(seconds)
    stages["Dynamo, packing and the call"] = took - sum(stages.values())
    longest = sorted(stages.items(), key=lambda stage: -stage[1])
    return f"{took:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
