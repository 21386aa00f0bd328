"""Run a reproduction: each clip, recipe and score is a file, so that a run that is stopped goes on where it ended."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...calibration.calibration import calibrate
from ...errors import Tahf4Error
from ...files.reading import read_json
from ...recipe.recipe import Recipe
from ..errors import CommandError
from ..evaluation.results import file_of, row_bytes, write_beside
from ..evaluation.rows import PLAIN, Row
from ..evaluation.run import prepare
from ..generation import experts
from .clips import ClipFile, clip_files, generate_missing
from .model import Prompted, digests, open_pipeline
from .protocol import Protocol
from .scores import Unscored, lpips_missing, pair_scores, vbench_scores

__all__ = ["ORIGINAL", "SETTINGS", "Device", "Setting", "check_same_run", "generate_all", "score_all", "versions"]


@dataclass(frozen=True)
class Setting:
    """A way to run the pipeline.

    Attributes:
        key: of its folders.
        row: what is done, as in an evaluation.
    """

    key: str
    row: Row = field(hash=False)


ORIGINAL = Setting("original", Row("original"))
SETTINGS = (
    Setting("naive", Row("naive HiF4", PLAIN)),
    # Not published: the percentile, the exponent, and whether there is a rotation. These are the choices here.
    Setting("paper", Row("the published recipe", {**PLAIN, "mask": "percentile", "percentile": 99.9})),
    Setting("ours", Row("tahf4, the defaults", {"sensitivity": False})),
)
"""In 4 bits. All keep the linears of the boundary in high precision: 12 of Wan2.2 A14B."""


@dataclass(frozen=True)
class Device:
    """How pipelines run.

    Attributes:
        name: of the device.
        offload: one component at a time is on it.
        inductor: graphs are compiled by Inductor, those of the original too.
    """

    name: str
    offload: bool = False
    inductor: bool = True

    def take(self, pipe: Any) -> Any:
        """Bring a pipeline to the device."""
        if self.offload:
            pipe.enable_model_cpu_offload(device=self.name)
            return pipe
        return pipe.to(self.name)


def check_same_run(protocol: Protocol, folder: Path, out: Path, device: Device) -> None:
    """Store what decides the clips in a folder, or compare it with what is stored there.

    Raises:
        CommandError: the folder holds clips of another protocol or model, or does not say what made them.
    """
    path = out / "run.json"
    former = _former(path)
    model, files = digests(folder, former.get("files", {}))
    now = protocol.fingerprint() | {
        "model": model,
        "settings": [[s.key, s.row.name, dict(s.row.recipe or {})] for s in SETTINGS],
        "device": device.name,
        "inductor": device.inductor,
        "versions": versions(),
    }
    now = json.loads(json.dumps(now))
    for key in now if former else ():
        if former.get(key) != now[key]:
            before, after = (_difference(former.get(key), now[key]), _difference(now[key], former.get(key)))
            raise CommandError(
                f"{out} holds a run with another protocol or model: {key} was {before}, and is {after}. Name "
                "another folder with -o, or delete this one"
            )
    if former != now | {"files": files}:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(now | {"files": files}, indent=1, allow_nan=False)
        write_beside(path, content.encode())


def _former(path: Path) -> dict[str, Any]:
    """Return what run.json holds, empty in a folder without a run."""
    try:
        found = read_json(path, CommandError) if path.exists() else {}
        if not isinstance(found.get("files", {}), dict):
            raise CommandError(f"{path} is damaged: its files are no JSON object")
        made = [name for name in ("clips", "recipes", "calibration.safetensors") if (path.parent / name).exists()]
        if made and not found:
            raise CommandError(f"{path} is missing or empty, and its folder holds {', '.join(made)}")
    except CommandError as error:
        raise CommandError(
            f"{error}. Only this file says what made the others. Delete the folder, or name another with -o"
        ) from error
    return found


def versions() -> dict[str, str]:
    """Return the versions of what generates."""
    names = ("tahf4-compiler", "torch", "diffusers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _difference(value: Any, other: Any) -> str:
    """Return what of a value the other does not have, short."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = {name: part for name, part in value.items() if name not in other or other[name] != part}
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + "..."


def generate_all(
    protocol: Protocol, folder: Path, out: Path, device: Device, settings: Sequence[Setting] = SETTINGS
) -> dict[Setting, list[ClipFile]]:
    """Generate what is missing: the original, the recipes, then each setting in 4 bits.

    Returns:
        The clips of each setting, the original first.

    Raises:
        CommandError: a file of a former run is damaged, or is of something else.
    """
    clips = {s: clip_files(protocol, out / "clips" / s.key) for s in (ORIGINAL, *settings)}
    for clip in (clip for mine in clips.values() for clip in mine if clip.path.exists()):
        clip.check()  # sooner than hours of others are generated
    recipes = {s: out / "recipes" / f"{s.key}.safetensors" for s in settings}
    wanted = [s for s in settings if not recipes[s].exists() and _missing(clips[s])]
    if wanted or _missing(clips[ORIGINAL]):
        pipe = Prompted(device.take(open_pipeline(folder, protocol)), protocol)
        if wanted:
            _make_recipes(pipe, protocol, {s: recipes[s] for s in wanted}, out, device)
        if _missing(clips[ORIGINAL]):
            for model in experts(pipe).values() if device.inductor else ():
                compile_blocks: Any = model.compile_repeated_blocks
                compile_blocks()
            generate_missing(pipe, protocol, clips[ORIGINAL], ORIGINAL.row.name)
        del pipe
        _free()
    for setting in settings:
        if not _missing(clips[setting]):
            continue
        with _made_here(recipes[setting]):
            recipe = Recipe.load(recipes[setting])
        loaded = open_pipeline(folder, protocol)
        # Packed before it goes to the device: there is room for one of the two.
        details = prepare(loaded, setting.row, recipe, pack=True, inductor=device.inductor)
        prompted = Prompted(device.take(loaded), protocol)
        generate_missing(prompted, protocol, clips[setting], setting.row.name, details["linears"])
        del loaded, prompted
        _free()
    return clips


@contextlib.contextmanager
def _made_here(path: Path) -> Iterator[None]:
    """Say of a file that this command made, and that does not load, that it is made again."""
    try:
        yield
    except Tahf4Error as error:
        raise CommandError(f"{error}. If you delete {path}, this command makes it again") from error


def _missing(clips: list[ClipFile]) -> bool:
    return not all(clip.path.exists() for clip in clips)


def _make_recipes(pipe: Any, protocol: Protocol, wanted: Mapping[Setting, Path], out: Path, device: Device) -> None:
    """Calibrate as the clips are generated: the same steps, scheduler and guidance."""
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    checkpoint = out / "calibration.safetensors"
    options = {"inductor": device.inductor}
    with _made_here(checkpoint):
        calibration = calibrate(pipe, step_groups=protocol.step_groups, checkpoint=checkpoint, options=options)
    with calibration:
        texts = [prompt.text for prompt in protocol.calibration_prompts]
        calibration.run(texts, **protocol.generate, output_type="latent")
    for setting, path in wanted.items():
        calibration.recipe(**dict(setting.row.recipe or {})).save(path)


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score_all(
    protocol: Protocol, clips: Mapping[Setting, list[ClipFile]], out: Path, python: str
) -> tuple[list[Path], list[str]]:
    """Score all clips; write a file for each setting, as an evaluation does for each of its rows.

    Returns:
        The files, and why something was not scored.
    """
    files, reasons = [], [reason for reason in (lpips_missing(),) if reason]
    for setting, mine in clips.items():
        home = out / "scores" / setting.key
        home.mkdir(parents=True, exist_ok=True)
        pairs = zip(clips[ORIGINAL], mine, strict=True)
        measured: list[dict[str, Any]] = [pair_scores(protocol, *pair, home) for pair in pairs]
        if protocol.scorer == "vbench":
            try:
                for name, values in vbench_scores(protocol, mine, home, python).items():
                    for clip, value in zip(measured, values, strict=True):
                        clip[name] = value
            except Unscored as reason:
                reasons.append(str(reason))
        for clip in measured:
            if len(protocol.dimensions) > 1 and all(clip.get(name) is not None for name in protocol.dimensions):
                clip["mean"] = sum(clip[name] for name in protocol.dimensions) / len(protocol.dimensions)
        rows = [
            {"prompt": clip.number, "caption": clip.text, "seed": clip.seed, **found}
            for clip, found in zip(mine, measured, strict=True)
        ]
        files.append(out / "scores" / file_of(setting.row))
        content = {"row": setting.row.name, "recipe": setting.row.recipe, "clips": rows}
        write_beside(files[-1], row_bytes(content))
    return files, list(dict.fromkeys(reasons))
