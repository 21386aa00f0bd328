"""Clips on disk: one file each, written beside its place and renamed, with the times of its steps."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import CommandError
from ..evaluation.results import write_beside
from ..generation import Run, StepTime, generate
from .protocol import Protocol

__all__ = ["ClipFile", "clip_files", "generate_missing", "run_of"]


@dataclass(frozen=True)
class ClipFile:
    """A clip and its place.

    Attributes:
        number: of its prompt.
        text: of its prompt.
        seed: of its noise.
        path: of the file.
    """

    number: int
    text: str
    seed: int
    path: Path

    @property
    def name(self) -> str:
        """Name without a suffix."""
        return self.path.stem

    def frames(self, chosen: list[int] | None = None) -> NDArray[np.float32]:
        """Return ``[frames, height, width, 3]`` in [0, 1]; NaN everywhere in a clip that was not finite.

        Args:
            chosen: indices of frames; all if None.
        """
        with self._open() as arrays:
            stored = arrays["frames"] if chosen is None else arrays["frames"][chosen]
            video = stored.astype(np.float32) / 255
            return video if arrays["finite"] else np.full_like(video, np.nan)

    def length(self) -> int:
        """Return the number of frames."""
        with self._open() as arrays:
            return len(arrays["frames"])

    def cost(self) -> tuple[list[StepTime], int, int]:
        """Return the times of the steps, the calls of a step, and the peak bytes of the GPU (0 without one)."""
        with self._open() as arrays:
            rows = zip(arrays["seconds"], arrays["experts"], arrays["first_of_clip"], arrays["first_call"], strict=True)
            steps = [StepTime(float(s), str(e), bool(f), bool(c)) for s, e, f, c in rows]
            return steps, int(arrays["calls"]), int(arrays["peak"])

    def _open(self) -> Any:
        try:
            return np.load(self.path)  # of plain arrays: numpy refuses objects by itself
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CommandError(f"{self.path} is no clip: {error}. Delete it; it is generated again") from error


def clip_files(protocol: Protocol, folder: Path) -> list[ClipFile]:
    """Return all clips of a protocol with their places in a folder; not every one need be there."""
    return [
        ClipFile(i, prompt.text, seed, folder / f"p{i:04d}_s{seed}.npz") for i, prompt, seed in protocol.clips()
    ]


def run_of(clips: list[ClipFile]) -> tuple[Run, int]:
    """Return the steps of clips as one run, and the peak bytes of the GPU."""
    run, peak = Run(), 0
    for clip in clips:
        steps, run.calls_per_step, bytes_ = clip.cost()
        run.steps += steps
        peak = max(peak, bytes_)
    return run, peak


def generate_missing(pipe: Any, protocol: Protocol, clips: list[ClipFile], label: str) -> None:
    """Generate every clip that has no file."""
    todo = [clip for clip in clips if not clip.path.exists()]
    cuda = torch.cuda.is_available()
    with tqdm(total=len(clips), initial=len(clips) - len(todo), desc=label, unit="clip") as overall:
        for clip in todo:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            arguments: Mapping[str, Any] = protocol.generate
            run = generate(pipe, [clip.text], arguments, seed=clip.seed, label=label, overall=overall)
            (video,) = run.videos
            finite = bool(np.isfinite(video).all())
            frames = (np.nan_to_num(video).clip(0, 1) * 255).round().astype(np.uint8)
            buffer = io.BytesIO()
            np.savez_compressed(
                buffer,
                frames=frames,
                finite=np.array(finite),
                seconds=np.array([step.seconds for step in run.steps]),
                experts=np.array([step.expert for step in run.steps]),
                first_of_clip=np.array([step.first_of_clip for step in run.steps]),
                first_call=np.array([step.first_call for step in run.steps]),
                calls=np.array(run.calls_per_step),
                peak=np.array(torch.cuda.max_memory_allocated() if cuda else 0),
            )
            clip.path.parent.mkdir(parents=True, exist_ok=True)
            write_beside(clip.path, buffer.getvalue())
