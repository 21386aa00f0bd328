"""What docs/packed.md shows runs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from diffusers import WanPipeline
from models import wan
from tahf4_compiler.tools import tiny_wan

import tahf4_compiler as tahf4
from tahf4_compiler.packed.convert import packed_linears

PAGE = (Path(__file__).parents[2] / "docs" / "packed.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ORIGINAL = Path(tiny_wan.__file__).parent / "pipeline"


def test_the_blocks_of_the_page_run(tmp_path):
    pipe = WanPipeline.from_pretrained(ORIGINAL, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    model, inputs = wan(num_layers=1)
    tahf4.quantize_(model)
    transformer = wan(num_layers=1)[0]
    tahf4.quantize_(transformer)
    namespace = {
        "torch": torch, "WanPipeline": WanPipeline, "tahf4": tahf4, "pipe": pipe, "options": {"inductor": False},
        "transformer": transformer, "scheduler": copy.deepcopy(pipe.scheduler),
        "original": ORIGINAL, "folder": tmp_path / "wan", "encoded": tmp_path / "encoded",
        "file": tmp_path / "model.pt2", "model": model, "inputs": {**inputs, "return_dict": False},
        "arguments": {
            "prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2,
            "output_type": "latent",
        },
    }
    with torch.no_grad():
        for code in BLOCKS:
            exec(compile(code, "docs/packed.md", "exec"), namespace)
    assert len(BLOCKS) == 8
    assert len(packed_linears(namespace["pipe"].text_encoder)) == 14
    settings = json.loads((tmp_path / "encoded" / "transformer_2" / "config.json").read_text())
    assert len(settings["quantization_config"]["linears"]) == 30
    assert (tmp_path / "model.pt2").exists()
