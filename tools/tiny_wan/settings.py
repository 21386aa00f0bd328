"""Generation settings of the tiny pipeline, for the demo, the examples and the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import data

PIPELINE_DIR = Path(__file__).parent / "pipeline"
"""Where the trained pipeline is shipped, loadable with `diffusers.WanPipeline.from_pretrained`."""

MAX_SEQUENCE_LENGTH = 16
"""Text tokens of a padded prompt; the transformers attend to the padding, and know no other length."""

GENERATION: dict[str, Any] = {
    "height": data.SIZE,
    "width": data.SIZE,
    "num_frames": data.FRAMES,
    "num_inference_steps": 16,
    "guidance_scale": 3.0,
    "guidance_scale_2": 2.0,
    "negative_prompt": "",
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}
"""Arguments of `WanPipeline.__call__` under which the pipeline was trained and judged."""

FRAMES_PER_SECOND = 8
"""Rate at which a generated clip is best shown."""
