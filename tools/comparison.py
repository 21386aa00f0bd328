"""Generate the same videos with a model as it is and compiled to W4A4, and put the numbers together."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import WanPipeline
from tqdm import tqdm

from ..model.linears import linear_weights, require_matches
from ..options import Options
from .generation import Run, experts, generate
from .media import psnr
from .plans import ExpertPlan, count_graphs, expert_plan, read_plans
from .tiny_wan import data
from .tiny_wan.judge import judge

__all__ = ["Outcome", "as_asked", "compare"]

COMPILE_SECONDS = "time of first and compiling steps beyond the median step, packing weights included"
STEP_SECONDS = (
    "median wall time of a denoising step (transformer calls, guidance and scheduler), without the first "
    "step of each clip and without steps in which a transformer ran for the first time or was compiled"
)


@dataclass(frozen=True)
class Outcome:
    """Both runs and what the compiler decided.

    Attributes:
        prompts: one a video.
        seed: of the first video; video ``i`` has ``seed + i``.
        arguments: of ``WanPipeline.__call__``.
        options: of the backend.
        original: the run of the model as it is.
        w4a4: the run of the compiled model.
        plans: one for each expert that ran.
        about: model, precision, device and versions.
    """

    prompts: Sequence[str]
    seed: int
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    original: Run
    w4a4: Run
    plans: Sequence[ExpertPlan]
    about: Mapping[str, Any] = field(default_factory=dict)

    def psnrs(self) -> list[float]:
        """Return the PSNR in dB of each W4A4 video against the original with the same seed."""
        return [psnr(a, b) for a, b in zip(self.original.videos, self.w4a4.videos, strict=True)]

    def judged(self) -> list[tuple[dict[str, bool] | None, dict[str, bool] | None]]:
        """Return for each prompt which of its words the two videos show."""
        videos = zip(self.prompts, self.original.videos, self.w4a4.videos, strict=True)
        return [(as_asked(prompt, a), as_asked(prompt, b)) for prompt, a, b in videos]

    def weights(self) -> dict[str, Any]:
        """Return counts and bytes of the linears of all experts that ran."""
        parts = [plan.as_json() for plan in self.plans]
        keys = ("linears", "quantized", "bytes_before", "bytes_after")
        return {**{key: sum(part[key] for part in parts) for key in keys}, "experts": parts}

    def kernels(self) -> list[str]:
        """Return the names of the kernels that ran in 4 bits."""
        return sorted(set().union(*(plan.kernels() for plan in self.plans)))

    def as_json(self) -> dict[str, Any]:
        """Return every number, with None for what was not measured or is not finite."""
        rows = zip(self.prompts, self.psnrs(), self.judged(), strict=True)
        return {
            **self.about,
            "options": {key: value for key, value in self.options.items() if key != "dump_dir"},
            "arguments": dict(self.arguments),
            "prompts": [
                {
                    "prompt": prompt,
                    "seed": self.seed + i,
                    "psnr_db": value if math.isfinite(value) else None,
                    "identical": value == math.inf,
                    "original_as_asked": before,
                    "w4a4_as_asked": after,
                }
                for i, (prompt, value, (before, after)) in enumerate(rows)
            ],
            "weights": self.weights(),
            "kernels": self.kernels(),
            "seconds": {
                "per_step_original": self.original.seconds_per_step(),
                "per_step_w4a4": self.w4a4.seconds_per_step(),
                "per_step_is": STEP_SECONDS,
                "steps_measured_original": len(self.original.measured()),
                "steps_measured_w4a4": len(self.w4a4.measured()),
                "model_calls_per_step": self.w4a4.calls_per_step,
                "compile": self.w4a4.first_call_seconds(),
                "compile_is": COMPILE_SECONDS,
            },
        }


def compare(
    pipe: WanPipeline,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    seed: int,
    options: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
) -> Outcome:
    """Generate each prompt with the original model, compile all transformers, and generate it again.

    Args:
        pipe: the pipeline; its transformers are compiled afterwards.
        prompts: one a video.
        arguments: of ``WanPipeline.__call__``.
        seed: of the first video.
        options: of the backend, with a new ``dump_dir``.
        about: facts to keep with the outcome.

    Raises:
        PatternError: an entry of ``options["keep"]`` is no regular expression or matches no linear; raised
            before anything is generated.
        CommandError: nothing was compiled.
    """
    models = experts(pipe)
    for name, model in models.items():
        require_matches(Options.parse(options).keep, [path for path, _ in linear_weights(model)], name)
    dumps = Path(options["dump_dir"])
    with tqdm(total=2 * len(prompts), desc="videos", unit="video") as overall:
        original = generate(pipe, prompts, arguments, seed=seed, label="original", overall=overall)
        for model in models.values():
            model.compile(backend="tahf4", options=dict(options))
        w4a4 = generate(
            pipe,
            prompts,
            arguments,
            seed=seed,
            label="W4A4 (the first step compiles)",
            overall=overall,
            compiled_graphs=lambda: count_graphs(dumps),
        )
    plans = read_plans(dumps)
    ran = {step.expert for step in w4a4.steps}
    return Outcome(
        prompts,
        seed,
        arguments,
        options,
        original,
        w4a4,
        [expert_plan(name, model, plans) for name, model in models.items() if name in ran],
        {**(about or {}), "versions": _versions()},
    )


def as_asked(prompt: str, video: np.ndarray) -> dict[str, bool] | None:
    """Return for each word of a caption whether a video shows it.

    None where there is nothing to judge: the prompt is none of the captions of the tiny pipeline, or the
    video is not of the size of its clips.
    """
    caption = next((c for c in data.all_captions() if str(c) == prompt), None)
    if caption is None or video.shape[1:3] != (data.SIZE, data.SIZE) or len(video) < 3:
        return None
    return judge(video).matches(caption)


def _versions() -> dict[str, str]:
    names = ("tahf4-compiler", "torch", "diffusers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
