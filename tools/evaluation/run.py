"""Run the rows of an evaluation, one file each, so that a run that is stopped takes up where it was."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from ...calibration.calibration import Calibration, calibrate
from ...calibration.from_weights import recipe_from_weights
from ...files.replacing import replacing
from ...packed.convert import quantize_
from ...recipe.apply import apply_recipe
from ...recipe.recipe import Recipe
from ..generation import experts, load_pipeline
from ..tiny_wan import data, settings
from .formats import simulate_
from .measures import measure, relative_errors
from .results import file_of, number, row_bytes, write_beside
from .rows import ROWS, Row
from .stress import stress_pipeline_

__all__ = ["REFERENCE", "Clips", "Plan", "evaluate_variant", "files_of", "generate", "home_of", "prepare"]

REFERENCE = "high precision"
STRESS_SEED = 11
CALIBRATION_PROMPTS = 8


@dataclass(frozen=True)
class Plan:
    """What is generated.

    Attributes:
        prompts: captions of the tiny pipeline, drawn from a fixed seed.
        seeds: of noise, for each prompt.
        steps: denoising steps.
        batch: clips at a time.
    """

    prompts: int = 64
    seeds: int = 3
    steps: int = settings.GENERATION["num_inference_steps"]
    batch: int = 8

    def captions(self) -> list[data.Caption]:
        """Return distinct captions; none is used for calibration."""
        order = np.random.default_rng(2026).permutation(len(data.all_captions()))
        return [data.all_captions()[i] for i in order[: self.prompts]]

    def calibration_captions(self) -> list[data.Caption]:
        """Return captions for calibration."""
        order = np.random.default_rng(2026).permutation(len(data.all_captions()))
        return [data.all_captions()[i] for i in order[::-1][:CALIBRATION_PROMPTS]]

    def clips(self) -> list[tuple[int, data.Caption, int]]:
        """Return ``(prompt number, caption, noise seed)`` of every clip."""
        pairs = enumerate(self.captions())
        return [(i, caption, 1000 * seed + i) for i, caption in pairs for seed in range(self.seeds)]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        return {**settings.GENERATION, "num_inference_steps": self.steps}


@dataclass(frozen=True)
class Clips:
    """Generated clips.

    Attributes:
        videos: ``[clips, frames, height, width, 3]`` in [0, 1].
        latents: ``[clips, steps, channels, frames, height, width]`` after each step.
    """

    videos: NDArray[np.float32]
    latents: NDArray[np.float32]


def generate(pipe: WanPipeline, plan: Plan, label: str) -> Clips:
    """Generate every clip of a plan."""
    videos, latents = [], []
    arguments = plan.arguments()
    negative = arguments.pop("negative_prompt")
    pipe.set_progress_bar_config(disable=True)
    clips = plan.clips()
    with tqdm(total=len(clips), desc=label, unit="clip", mininterval=5.0) as bar, torch.no_grad():
        for start in range(0, len(clips), plan.batch):
            part = clips[start : start + plan.batch]
            steps: list[NDArray[np.float32]] = []

            def keep(pipe: Any, i: int, t: Any, tensors: dict[str, Any], steps: Any = steps) -> dict[str, Any]:
                steps.append(tensors["latents"].float().cpu().numpy())
                return tensors

            found = pipe(
                [str(caption) for _, caption, _ in part],
                [negative] * len(part),
                generator=[torch.Generator().manual_seed(seed) for *_, seed in part],
                output_type="np",
                callback_on_step_end=keep,
                **arguments,
            ).frames
            videos.append(np.asarray(found, np.float32))
            latents.append(np.stack(steps, 1))
            bar.update(len(part))
    return Clips(np.concatenate(videos), np.concatenate(latents))


def evaluate_variant(
    variant: str, plan: Plan, folder: Path, *, rows: Sequence[Row] = ROWS, model_dir: Path = settings.PIPELINE_DIR
) -> None:
    """Generate with every row that has no file yet, and write what was measured.

    Args:
        variant: ``"plain"``, ``"stress"`` or ``"spikes"``.
        plan: what to generate.
        folder: for ``variant/key/*.json``; the key names plan and weights.
        rows: to run.
        model_dir: of the saved tiny pipeline.
    """
    home = folder / variant / _key(plan, model_dir)
    home.mkdir(parents=True, exist_ok=True)
    todo = [row for row in (Row(REFERENCE), *rows) if not (home / file_of(row)).exists()]
    if not todo:
        return
    pipe = load_pipeline(model_dir, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    if variant != "plain":
        prompt = str(plan.calibration_captions()[0])
        noise = torch.Generator().manual_seed(STRESS_SEED)
        arguments = {**settings.GENERATION, "prompt": prompt, "generator": noise}
        reports = stress_pipeline_(pipe, STRESS_SEED, arguments, undone_by_masks=variant == "stress")
        text = "\n".join(f"{name}\n{report}" for name, report in reports.items())
        write_beside(home / "stress.txt", (text + "\n").encode())
    reference = _reference(pipe, plan, home)
    original = experts(pipe)
    calibration = _calibration(pipe, plan, home) if any(map(_needs_calls, todo)) else None
    for row in todo:
        for name, model in original.items():
            setattr(pipe, name, copy.deepcopy(model))
        details = prepare(pipe, row, _recipe(pipe, row, calibration)) if row.name != REFERENCE else {}
        clips = reference if row.name == REFERENCE else generate(pipe, plan, f"{variant}: {row.name}")
        write_beside(home / file_of(row), _as_json(row, variant, plan, reference, clips, details))
        for name, model in original.items():
            setattr(pipe, name, model)
        torch._dynamo.reset()


def _needs_calls(row: Row) -> bool:
    return row.recipe is not None and row.recipe.get("mask") != "weights"


def _recipe(pipe: WanPipeline, row: Row, calibration: Calibration | None) -> Recipe | None:
    if row.recipe is None:
        return None
    if not _needs_calls(row):
        return recipe_from_weights(pipe, **{name: value for name, value in row.recipe.items() if name != "mask"})
    assert calibration is not None
    return calibration.recipe(**row.recipe)


def prepare(
    pipe: Any, row: Row, recipe: Recipe | None, *, pack: bool = False, inductor: bool = False
) -> dict[str, Any]:
    """Make a pipeline run as a row says; return what there is to know about it.

    Args:
        pipe: a pipeline of Wan; it is changed.
        row: what to do.
        recipe: made with ``row.recipe``.
        pack: pack the linears and free their weights, and compile the repeated blocks, instead of compiling the whole
            model beside its weights.
        inductor: compile the lowered graphs with Inductor.
    """
    details: dict[str, Any] = {}
    if row.simulate is not None:
        for model in experts(pipe).values():
            simulate_(model, _body(model), row.simulate, hadamard_block=row.block)
        return details
    if recipe is not None:
        details["high_precision"] = {
            expert: {p: e.reason for p, e in recipe.linears(expert).items() if e.decision != "hif4"}
            for expert in recipe.experts
        }
    if pack:
        plan = quantize_(pipe, recipe)
        packed = [d for d in plan if d.decision == "hif4"]
        details["linears"] = {
            "in_4_bits": len(packed),
            "in_high_precision": len(plan) - len(packed),
            "bytes_before": sum(d.bytes_before for d in plan),
            "bytes_after": sum(d.bytes_after for d in plan),
        }
    elif recipe is not None:
        apply_recipe(pipe, recipe)
    for model in experts(pipe).values():
        run: Any = model.compile_repeated_blocks if pack else model.compile
        run(backend="tahf4", options={"inductor": inductor, **row.options})
    return details


def _body(model: nn.Module) -> list[str]:
    """Return the linears inside the blocks, which is what the default plan quantizes."""
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith("blocks.")]


def _calibration(pipe: WanPipeline, plan: Plan, home: Path) -> Calibration:
    checkpoint = home / "calibration.safetensors"
    with calibrate(pipe, step_groups=4, checkpoint=checkpoint, options={"inductor": False}) as calibration:
        calibration.run([str(caption) for caption in plan.calibration_captions()], **plan.arguments())
    return calibration


def _reference(pipe: WanPipeline, plan: Plan, home: Path) -> Clips:
    path = home / "reference.npz"
    if path.exists():
        with np.load(path) as arrays:  # of plain arrays: numpy refuses objects by itself
            return Clips(arrays["videos"], arrays["latents"])
    clips = generate(pipe, plan, REFERENCE)
    with replacing(path) as beside:
        np.savez(beside, videos=clips.videos, latents=clips.latents)
    return clips


def _as_json(
    row: Row, variant: str, plan: Plan, reference: Clips, clips: Clips, details: Mapping[str, Any]
) -> bytes:
    captions = [caption for _, caption, _ in plan.clips()]
    found = measure(
        clips.videos,
        captions,
        reference=reference.videos,
        latents=clips.latents[:, -1],
        reference_latents=reference.latents[:, -1],
    )
    steps = range(clips.latents.shape[1])
    by_step = np.stack([relative_errors(reference.latents[:, s], clips.latents[:, s]) for s in steps], 1)
    measured = [
        {
            "prompt": prompt,
            "caption": str(caption),
            "seed": seed,
            **{name: number(values[i]) for name, values in found.items()},
            "step_errors": [number(value) for value in by_step[i]],
        }
        for i, (prompt, caption, seed) in enumerate(plan.clips())
    ]
    return row_bytes({"row": row.name, "variant": variant, "recipe": row.recipe, **details, "clips": measured})


def files_of(home: Path, rows: Sequence[Row] = ROWS) -> list[Path]:
    """Return the files of rows that were run, in the order of the rows."""
    return [home / file_of(row) for row in (Row(REFERENCE), *rows) if (home / file_of(row)).exists()]


def home_of(variant: str, plan: Plan, folder: Path, model_dir: Path = settings.PIPELINE_DIR) -> Path:
    """Return the folder of a variant's rows."""
    return folder / variant / _key(plan, model_dir)


def _key(plan: Plan, model_dir: Path) -> str:
    """Return a short name that changes with the plan and the weights."""
    digest = hashlib.sha256(repr(plan).encode())
    for path in sorted(model_dir.rglob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"{plan.prompts}x{plan.seeds}_{digest.hexdigest()[:10]}"

