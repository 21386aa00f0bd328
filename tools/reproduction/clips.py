"""Clips on disk: one file each, written beside its place and renamed, with the times of its steps."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
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
from .protocol import Protocol, file_digest

__all__ = ["ClipFile", "clip_files", "generate_missing", "run_of"]


@dataclass(frozen=True)
class ClipFile:
    """A clip and its place.

    Attributes:
        setting: key of how the pipeline ran.
        number: of its prompt.
        text: of its prompt.
        seed: of its noise.
        path: of the file.
    """

    setting: str
    number: int
    text: str
    seed: int
    path: Path

    @property
    def name(self) -> str:
        """Name without a suffix."""
        return self.path.stem

    def digest(self) -> str:
        """Return the sha256 of the file, which names what was measured on it."""
        return file_digest(self.path)

    def check(self) -> None:
        """Check that the file holds this clip, not its frames.

        Raises:
            CommandError: it is damaged, or of another setting, prompt or seed. So does everything else that reads it.
        """
        with self._open():
            pass

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

    def linears(self) -> dict[str, Any] | None:
        """Return how many linears ran in 4 bits and their bytes, as :func:`evaluation.run.prepare` counts them."""
        with self._open() as arrays:
            found: dict[str, Any] | None = json.loads(str(arrays["linears"]))
            return found

    def save(self, run: Run, *, linears: Mapping[str, Any] | None = None, peak: int = 0) -> None:
        """Write the file: what it is of, its frames without loss but for 8 bits, and what it took.

        Args:
            run: of this clip alone.
            linears: see :meth:`linears`; None for the original.
            peak: bytes of the GPU.
        """
        (video,) = run.videos
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            made_of=np.array(json.dumps(self._made_of())),
            frames=(np.nan_to_num(video).clip(0, 1) * 255).round().astype(np.uint8),
            finite=np.array(bool(np.isfinite(video).all())),
            seconds=np.array([step.seconds for step in run.steps]),
            experts=np.array([step.expert for step in run.steps]),
            first_of_clip=np.array([step.first_of_clip for step in run.steps]),
            first_call=np.array([step.first_call for step in run.steps]),
            calls=np.array(run.calls_per_step),
            peak=np.array(peak),
            linears=np.array(json.dumps(linears)),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(self.path, buffer.getvalue())

    def _made_of(self) -> dict[str, Any]:
        return {"setting": self.setting, "prompt": self.text, "seed": self.seed}

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """Yield the arrays; each is checked as it is read, so errors of the ``with`` block are of the file, too."""
        again = "Delete it; it is generated again"
        try:
            with np.load(self.path) as arrays:  # of plain arrays: numpy refuses objects by itself
                found, expected = json.loads(str(arrays["made_of"])), self._made_of()
                if found != expected:
                    raise CommandError(f"{self.path} is of {found}; expected {expected}. {again}")
                yield arrays
        except CommandError:
            raise
        except Exception as error:  # of numpy, zipfile and zlib, for whatever a damaged file can hold
            raise CommandError(f"{self.path} is no clip: {error}. {again}") from error


def clip_files(protocol: Protocol, folder: Path) -> list[ClipFile]:
    """Return all clips of a protocol with their places in the folder of a setting; not every one need be there."""
    return [
        ClipFile(folder.name, i, prompt.text, seed, folder / f"p{i:04d}_s{seed}.npz")
        for i, prompt, seed in protocol.clips()
    ]


def run_of(clips: list[ClipFile]) -> tuple[Run, int]:
    """Return the steps of clips as one run, and the peak bytes of the GPU."""
    run, peak = Run(), 0
    for clip in clips:
        steps, run.calls_per_step, bytes_ = clip.cost()
        run.steps += steps
        peak = max(peak, bytes_)
    return run, peak


def generate_missing(
    pipe: Any, protocol: Protocol, clips: list[ClipFile], label: str, linears: Mapping[str, Any] | None = None
) -> None:
    """Generate every clip that has no file."""
    todo = [clip for clip in clips if not clip.path.exists()]
    cuda = torch.cuda.is_available()
    with tqdm(total=len(clips), initial=len(clips) - len(todo), desc=label, unit="clip") as overall:
        for clip in todo:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            arguments: Mapping[str, Any] = protocol.generate
            run = generate(pipe, [clip.text], arguments, seed=clip.seed, label=label, overall=overall)
            clip.save(run, linears=linears, peak=torch.cuda.max_memory_allocated() if cuda else 0)
