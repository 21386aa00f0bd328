"""Score clips: against the original of the same seed, by the judge of the tiny pipeline, and by VBench."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import export_to_video
from PIL import Image
from tqdm import tqdm

from ...files.reading import read_json
from ...files.replacing import replacing
from ..errors import CommandError
from ..evaluation.measures import judgements, psnrs, ssims
from ..evaluation.results import number, write_beside
from ..tiny_wan import data
from .clips import ClipFile
from .protocol import Protocol

__all__ = ["Unscored", "lpips_missing", "pair_scores", "vbench_scores"]


class Unscored(Exception):
    """A scorer that cannot run here, and why."""


def lpips_missing() -> str | None:
    """Return why LPIPS cannot be measured, or None."""
    if importlib.util.find_spec("lpips") is None:
        return "LPIPS: the package lpips is not installed (pip install lpips)"
    return None


def pair_scores(protocol: Protocol, original: ClipFile, clip: ClipFile, folder: Path) -> dict[str, float | None]:
    """Return PSNR, SSIM, LPIPS where it is installed, and what the judge says where it is the scorer.

    The numbers are kept in a file with the digests of the two clips, so that a run that was stopped measures no clip
    twice. A file of other clips, or one that is damaged, is made again.

    Args:
        protocol: names the scorer and its dimensions.
        original: clip of the same prompt and seed.
        clip: to score, or the original itself.
        folder: of the files.

    Raises:
        CommandError: the original is not finite, or a clip is damaged.
    """
    path = folder / f"{clip.name}.json"
    names = ["psnr", "ssim", *([] if lpips_missing() else ["lpips"])]
    names += protocol.dimensions if protocol.scorer == "judge" else ()
    of = [original.digest(), clip.digest()]
    kept = _kept(path)
    if kept.get("clips") == of and all(isinstance(kept.get(name, ""), int | float | None) for name in names):
        return {name: kept[name] for name in names}
    reference, video = original.frames(), clip.frames()
    if not np.isfinite(reference).all():
        raise CommandError(f"the original generated values that are not finite ({original.path}): nothing to compare")
    found: dict[str, float | None] = {
        "psnr": number(psnrs(reference[None], video[None])[0]),
        "ssim": number(ssims(reference[None], video[None])[0]),
    }
    if "lpips" in names:
        found["lpips"] = _lpips(reference, video)
    if protocol.scorer == "judge":
        caption = next(caption for caption in data.all_captions() if str(caption) == clip.text)
        verdict = judgements(video[None], [caption])
        found |= {name: number(verdict[name][0]) for name in protocol.dimensions}
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(path, json.dumps({"clips": of, **found}, allow_nan=False).encode())
    return found


def _kept(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, CommandError) if path.exists() else {}
    except CommandError:  # measured again sooner than anyone deletes it
        return {}


def _lpips(reference: np.ndarray, video: np.ndarray) -> float | None:
    """Return the mean over frames of LPIPS with AlexNet; None, the worst there is, where the clip is not finite."""
    import lpips

    if not np.isfinite(video).all():
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _networks.setdefault(device, None) or lpips.LPIPS(net="alex", verbose=False).to(device)
    _networks[device] = model
    total = 0.0
    with torch.no_grad():
        for a, b in zip(reference, video, strict=True):
            pair = (torch.from_numpy(frame).permute(2, 0, 1)[None].to(device) for frame in (a, b))
            total += float(model(*pair, normalize=True))  # values in [0, 1]
    return total / len(video)


_networks: dict[str, Any] = {}


def vbench_scores(protocol: Protocol, clips: list[ClipFile], folder: Path, python: str) -> dict[str, list[float]]:
    """Return what VBench says of clips, by dimension.

    Its results are kept in a file whose name is a digest of the clips and of what is asked.

    Args:
        protocol: names the dimensions.
        clips: of one setting.
        folder: for the videos that VBench reads, and for its results.
        python: the interpreter that has VBench.

    Raises:
        Unscored: VBench or a package that writes videos is not there, or VBench failed.
    """
    if len(clips) < 2:
        raise Unscored("VBench: its subject consistency divides by the number of clips less one; take a second seed")
    asked = json.dumps([protocol.dimensions, protocol.frames_per_second, [clip.digest() for clip in clips]])
    results = folder / f"vbench_{hashlib.sha256(asked.encode()).hexdigest()[:8]}.json"
    if not results.exists():
        videos = _videos(protocol, clips, folder / f"videos_{protocol.frames_per_second}_fps")
        log = folder / "vbench.log"
        tqdm.write(f"VBench scores {videos}; what it prints is in {log}", file=sys.stderr)
        beside = tempfile.TemporaryDirectory(prefix=".vbench-", dir=folder)
        with log.open("w", encoding="utf-8") as printed, beside as output:
            request = {
                "videos": str(videos.resolve()),
                "prompts": {f"{clip.name}.mp4": clip.text for clip in clips},
                "dimensions": list(protocol.dimensions),
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "output": output,
            }
            script = Path(__file__).with_name("vbench_script.py").read_text(encoding="utf-8")
            try:
                done = subprocess.run(
                    [python, "-c", script, json.dumps(request)], stdout=printed, stderr=subprocess.STDOUT, cwd=output
                )
            except OSError as error:
                raise Unscored(f"VBench: {python} does not run: {error.strerror}") from error
            if done.returncode == 3:
                raise Unscored(
                    f"VBench: {python} does not have the package vbench. Install it, or name a Python that has it "
                    "with --vbench-python; then run the same command again"
                )
            made = Path(output) / "scores_eval_results.json"
            if done.returncode or not made.exists():
                last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
                raise Unscored(f"VBench failed (exit code {done.returncode}): {last}. {log} says more")
            write_beside(results, made.read_bytes())
    return _read(results, protocol, clips)


def _videos(protocol: Protocol, clips: list[ClipFile], folder: Path) -> Path:
    """Write clips as the mp4 files that VBench reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in ("imageio", "imageio_ffmpeg"):
        if importlib.util.find_spec(package) is None:
            raise Unscored(f"VBench reads mp4 files, and {package} is not installed (pip install imageio[ffmpeg])")
    for clip in clips:
        path = folder / f"{clip.name}.mp4"
        video = np.nan_to_num(clip.frames())
        frames = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in video]
        with replacing(path) as beside:
            export_to_video(frames, str(beside), fps=protocol.frames_per_second, quality=10)
    return folder


def _read(path: Path, protocol: Protocol, clips: list[ClipFile]) -> dict[str, list[float]]:
    """Read VBench's file: for each dimension the mean, and a list of ``video_path`` and ``video_results``."""
    found: dict[str, list[float]] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for dimension in protocol.dimensions:
            mean, each = content[dimension]
            by_name = {Path(entry["video_path"]).stem: float(entry["video_results"]) for entry in each}
            values = [by_name[clip.name] for clip in clips]
            # Imaging quality is 0 to 100 for a clip, and 0 to 1 in the mean.
            found[dimension] = [value / 100 for value in values] if np.mean(values) > 1 >= float(mean) else values
    except (ValueError, KeyError, TypeError) as error:
        raise Unscored(
            f"VBench wrote {path}, which is not what was expected ({error!r}): for each dimension a mean and a list "
            "of video_path and video_results. Delete it to score again"
        ) from error
    return found
