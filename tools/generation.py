"""Load a Wan pipeline, generate videos with it, and time its denoising steps."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import WanPipeline
from torch import nn
from tqdm import tqdm

from ..errors import Tahf4Error
from ..model.components import WAN_EXPERTS, unwrapped_experts
from ..packed.steps import set_high_precision_steps, steps_of
from .errors import CommandError

__all__ = ["WAN_PIPELINES", "Run", "StepTime", "class_of", "experts", "generate", "load_pipeline"]

WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


def load_pipeline(path: Path, dtype: torch.dtype, device: str, classes: Sequence[str] = WAN_PIPELINES[:1]) -> Any:
    """Load a saved pipeline of Wan without a network.

    Args:
        path: a folder with ``model_index.json``, as ``pipe.save_pretrained(path)`` writes it.
        dtype: of the transformers and the text encoder (layers that diffusers keeps in float32 stay so);
            the autoencoder is loaded in float32.
        device: where it runs.
        classes: names of pipelines that are expected.

    Raises:
        CommandError: no such folder, or it holds none of these pipelines.
    """
    expected = " or ".join(f"a {known}" for known in classes)
    hint = "Give a folder that `WanPipeline.save_pretrained` wrote, or none for the pipeline that is shipped."
    name = class_of(path, hint)
    if name not in classes:
        raise CommandError(f"{path} is a {name}; expected {expected}. {hint}")
    parts = dict.fromkeys((*WAN_EXPERTS, "text_encoder"), dtype)
    try:
        with warnings.catch_warnings():
            # The name `dtype` is newer than the oldest diffusers that is supported.
            warnings.filterwarnings("ignore", "`?torch_dtype", FutureWarning)
            pipe = getattr(diffusers, name).from_pretrained(
                path, torch_dtype={**parts, "default": torch.float32}, local_files_only=True
            )
    except Exception as error:  # of many libraries, for whatever a folder can hold
        raise CommandError(f"{path} does not load as a {name}: {error}") from error
    return _ready(pipe, device)


def load_any_pipeline(path: Path, dtype: torch.dtype, device: str) -> Any:
    """Load a saved diffusers pipeline of any class without a network; one of Wan as :func:`load_pipeline` does.

    Raises:
        CommandError: no such folder, or it holds no pipeline that loads.
    """
    if class_of(path, "Give a folder that `pipe.save_pretrained` wrote.") in WAN_PIPELINES:
        return load_pipeline(path, dtype, device, WAN_PIPELINES)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    except Exception as error:  # of many libraries, for whatever a folder can hold
        raise CommandError(f"{path} does not load as a diffusers pipeline: {error}") from error
    return _ready(pipe, device)


def _ready(pipe: Any, device: str) -> Any:
    """Return a pipeline on a device, with the steps in high precision that its folder names, if it is packed."""
    if any(steps_of(module) is not None for module in unwrapped_experts(pipe).values()):
        set_high_precision_steps(pipe)
    return pipe.to(device)


def class_of(path: Path, hint: str) -> str:
    """Return the name of the class of a saved pipeline.

    Args:
        path: its folder.
        hint: what to do, for the error.

    Raises:
        CommandError: no such folder, or it holds no pipeline.
    """
    if not path.is_dir():
        raise CommandError(f"there is no folder {path}. {hint}")
    index = path / "model_index.json"
    if not index.is_file():
        raise CommandError(f"the folder {path} is no pipeline: it has no model_index.json. {hint}")
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{index} names no pipeline class: {error!r}. {hint}") from error


def experts(pipe: WanPipeline) -> dict[str, nn.Module]:
    """Return the pipeline's transformers by name: one for Wan2.1, two for Wan2.2."""
    found = {name: getattr(pipe, name, None) for name in WAN_EXPERTS}
    return {name: module for name, module in found.items() if module is not None}


@dataclass(frozen=True)
class StepTime:
    """The time of one denoising step.

    Attributes:
        seconds: from the end of the step before (for the first step: from the start of the pipeline call, so
            text encoding is in it).
        expert: name of the transformer that ran.
        first_of_clip: the first step of a video.
        first_call: an expert's first step, or one in which a graph was compiled.
    """

    seconds: float
    expert: str
    first_of_clip: bool
    first_call: bool


@dataclass
class Run:
    """Videos of some prompts, one after another, and the times of their steps.

    Attributes:
        videos: float ``[frames, height, width, 3]`` in [0, 1], one a prompt.
        steps: all steps of all videos.
        calls_per_step: calls of the transformer in a step: 2 with guidance.
    """

    videos: list[np.ndarray] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    calls_per_step: int = 1

    def measured(self) -> list[float]:
        """Return the seconds of the steps that are neither the first of a clip nor an expert's first."""
        return [step.seconds for step in self.steps if not (step.first_of_clip or step.first_call)]

    def seconds_per_step(self) -> float | None:
        """Return the median of the measured steps, or None where there is none."""
        return statistics.median(self.measured()) if self.measured() else None

    def first_call_seconds(self) -> float:
        """Return what first calls took beyond the median step: compiling, packing weights, warming up."""
        usual = self.seconds_per_step() or 0.0
        return sum(max(0.0, step.seconds - usual) for step in self.steps if step.first_call)


def generate(
    pipe: WanPipeline,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    seed: int,
    label: str,
    overall: tqdm,
    compiled_graphs: Callable[[], int] = lambda: 0,
) -> Run:
    """Generate a video for each prompt.

    Args:
        pipe: the pipeline.
        prompts: one a video.
        arguments: of ``WanPipeline.__call__``.
        seed: video ``i`` starts from the noise of a fresh generator with seed ``seed + i``.
        label: for the progress bar.
        overall: progress bar over all videos, moved on by one for each.
        compiled_graphs: says how many graphs were compiled so far, so that steps that compiled are known.
    """
    run = Run()
    clock = _Clock(run, compiled_graphs)
    for i, prompt in enumerate(prompts):
        pipe.set_progress_bar_config(desc=f"{label} {i + 1}/{len(prompts)}", position=1, leave=False)
        clock.start()
        try:
            video = pipe(
                prompt=prompt,
                generator=torch.Generator().manual_seed(seed + i),
                output_type="np",
                callback_on_step_end=clock,
                **arguments,
            ).frames[0]
        except Tahf4Error:
            raise
        except ValueError as error:
            raise CommandError(f"the pipeline refuses these arguments: {error}") from error
        run.videos.append(np.asarray(video, dtype=np.float32))
        run.calls_per_step = 2 if pipe.do_classifier_free_guidance else 1
        overall.update()
    return run


class _Clock:
    """A ``callback_on_step_end`` that notes how long each step took."""

    def __init__(self, run: Run, compiled_graphs: Callable[[], int]) -> None:
        self._run = run
        self._compiled_graphs = compiled_graphs
        self._graphs = compiled_graphs()
        self._seen: set[str] = set()
        self._last = 0.0

    def start(self) -> None:
        """Start the time of a video's first step."""
        self._last = _now()

    def __call__(self, pipe: WanPipeline, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Note a step that ended."""
        now = _now()
        expert = _expert(pipe, float(timestep))
        graphs = self._compiled_graphs()
        first = expert not in self._seen or graphs != self._graphs
        self._run.steps.append(StepTime(now - self._last, expert, index == 0, first))
        self._seen.add(expert)
        self._graphs = graphs
        self._last = _now()
        return tensors


def _expert(pipe: WanPipeline, timestep: float) -> str:
    """Return which transformer the pipeline calls at a timestep, by the rule of ``WanPipeline``."""
    ratio = pipe.config.boundary_ratio
    high = ratio is None or timestep >= ratio * pipe.scheduler.config.num_train_timesteps
    return WAN_EXPERTS[0 if high else 1]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
