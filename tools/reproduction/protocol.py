"""The protocol of a reproduction, read from YAML: what is generated, how it is calibrated and how it is scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from PIL import Image

from ...model.components import WAN_EXPERTS
from ..errors import CommandError
from ..tiny_wan import data

__all__ = ["DIMENSIONS", "SHIPPED", "Lora", "Prompt", "Protocol", "file_digest", "load_protocol", "parse_protocol"]

SHIPPED = Path(__file__).parent / "protocols"
"""Folder of the protocols that ship; the name of a file without ``.yaml`` names it."""

DIMENSIONS: dict[str, tuple[str, ...]] = {
    # Those that VBench scores for prompts of any kind (`mode="custom_input"`).
    "vbench": (
        *("subject_consistency", "motion_smoothness", "imaging_quality", "aesthetic_quality", "overall_consistency"),
        *("background_consistency", "temporal_flickering", "dynamic_degree", "temporal_style"),
    ),
    "judge": ("subject_consistency", "motion_smoothness", "colour", "shape", "size", "direction"),
}
"""Scorer -> what it can score. ``judge`` knows the captions of the tiny pipeline alone."""

REQUIRED = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
OURS = ("prompt", "image", "generator", "output_type", "latents", "num_videos_per_prompt", "return_dict")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Prompt:
    """What a clip should show.

    Attributes:
        text: of the prompt.
        image: file of the first frame, for pipelines that start from an image.
    """

    text: str
    image: Path | None = None


@dataclass(frozen=True)
class Lora:
    """Weights that are fused into a transformer before anything else, such as those of a student of few steps.

    Attributes:
        path: a file, a folder or a name on the hub.
        weight_name: of the file in the folder.
        expert: which transformer.
        scale: of the weights.
    """

    path: str
    weight_name: str | None = None
    expert: str = "transformer"
    scale: float = 1.0

    def local(self) -> Path | None:
        """Return the file or folder, or None for a name on the hub."""
        path = Path(self.path)
        path = path / self.weight_name if self.weight_name and path.is_dir() else path
        return path if path.exists() else None

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the weights, as JSON: files by their content, wherever they are; else the hub's name."""
        path = self.local()
        if path is None:
            return dataclasses.asdict(self)
        files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
        return {"sha256": [file_digest(file) for file in files], "expert": self.expert, "scale": self.scale}

    def __str__(self) -> str:
        """Return its name, as the protocol has it, where it goes, and its digest if it is here."""
        where = "/".join(filter(None, [self.path, self.weight_name]))
        digests = [digest[:16] for digest in self.fingerprint().get("sha256", [])]
        known = f"sha256 {', '.join(digests)}..." if digests else "from the hub"
        return f"{where} into {self.expert}, scale {self.scale:g} ({known})"


@dataclass(frozen=True)
class Protocol:
    """What a reproduction generates and scores.

    Attributes:
        name: of the file.
        prompts: one or more clips each.
        seeds: of the noise, for each prompt.
        generate: arguments of the pipeline's call.
        calibration_prompts: none of them is among the prompts.
        step_groups: parts of the schedule whose statistics are apart.
        scorer: a key of :data:`DIMENSIONS`.
        dimensions: that are scored.
        scheduler: ``{"class": a scheduler of diffusers, ...}`` with its settings, or settings alone; empty for that of
            the model.
        lora: fused into the transformers, in order.
        dtype: of the original.
        frames_per_second: of the clips, which VBench samples by time.
        about: what it is, for the report.
    """

    name: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    generate: Mapping[str, Any]
    calibration_prompts: tuple[Prompt, ...]
    scorer: str
    dimensions: tuple[str, ...]
    step_groups: int = 4
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    lora: tuple[Lora, ...] = ()
    dtype: str = "bfloat16"
    frames_per_second: int = 16
    about: str = ""

    @property
    def steps(self) -> int:
        """Denoising steps of a clip."""
        return int(self.generate["num_inference_steps"])

    @property
    def calls(self) -> int:
        """Calls of a transformer in a step: two with guidance."""
        return 2 if self.generate["guidance_scale"] > 1 else 1

    def clips(self) -> list[tuple[int, Prompt, int]]:
        """Return ``(number of the prompt, prompt, seed)`` of every clip."""
        return [(i, prompt, seed) for i, prompt in enumerate(self.prompts) for seed in self.seeds]

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the clips, as JSON: two protocols with the same make the same clips."""

        def shown(prompts: Sequence[Prompt]) -> list[Any]:
            return [[p.text, file_digest(p.image)] if p.image is not None else p.text for p in prompts]

        return {
            "prompts": shown(self.prompts),
            "seeds": list(self.seeds),
            "generate": dict(self.generate),
            "calibration prompts": shown(self.calibration_prompts),
            "step groups": self.step_groups,
            "scheduler": dict(self.scheduler),
            "lora": [part.fingerprint() for part in self.lora],
            "dtype": self.dtype,
        }


def load_protocol(name: str) -> Protocol:
    """Read a protocol: one that ships, by its name, or a YAML file.

    Raises:
        CommandError: there is no such protocol, or it is not valid.
    """
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.yaml")))
        raise CommandError(f"there is no protocol {name}; give a YAML file or one of those that ship: {known}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is no YAML: {error}") from error
    return parse_protocol(content, path)


def parse_protocol(content: Any, path: Path) -> Protocol:
    """Check what a YAML file holds.

    Args:
        content: of the file.
        path: of the file; files that it names are relative to its folder.

    Raises:
        CommandError: a key is unknown, missing or of the wrong kind.
    """
    read = _Reader(path)
    known = ("about", "prompts", "seeds", "generate", "frames_per_second", "dtype", "scheduler", "lora")
    top = read.mapping(content, "", (*known, "calibration", "scorer", "dimensions"))
    generate = _generate(read, top)
    calibration = read.mapping(top.get("calibration"), "calibration", ("prompts", "step_groups"))
    prompts = read.prompts(top.get("prompts"), "prompts")
    seen = read.prompts(calibration.get("prompts"), "calibration.prompts")
    both = {p.text for p in prompts} & {p.text for p in seen}
    if both:
        read.fail(f"{sorted(both)[0]!r} is scored and calibrated with; calibrate with other prompts")
    groups = read.number(calibration.get("step_groups", 4), "calibration.step_groups", 1)
    steps = generate["num_inference_steps"]
    if groups > steps:
        read.fail(f"calibration.step_groups is {groups}, and a clip has {steps} steps; expected at most {steps}")
    scorer = read.one_of(top.get("scorer", "vbench"), "scorer", tuple(DIMENSIONS))
    seeds = read.items(top.get("seeds", [0]), "seeds")
    if len(set(map(str, seeds))) != len(seeds):
        read.fail(f"seeds are {seeds}; expected distinct numbers")
    scheduler = top.get("scheduler") or {}
    if not isinstance(scheduler, Mapping) or not isinstance(scheduler.get("class", ""), str):
        read.fail(f"scheduler is {scheduler!r}; expected settings, such as {{class: UniPCMultistepScheduler}}")
    read.plain(scheduler, "scheduler")
    protocol = Protocol(
        path.stem,
        prompts,
        tuple(read.number(seed, "seeds", 0) for seed in seeds),
        generate,
        seen,
        scorer,
        tuple(
            read.one_of(dimension, "dimensions", DIMENSIONS[scorer])
            for dimension in read.items(top.get("dimensions", list(DIMENSIONS[scorer][:5])), "dimensions")
        ),
        groups,
        dict(scheduler),
        tuple(_lora(read, entry) for entry in (read.items(top["lora"], "lora") if top.get("lora") else ())),
        read.one_of(top.get("dtype", "bfloat16"), "dtype", DTYPES),
        read.number(top.get("frames_per_second", 16), "frames_per_second", 1),
        " ".join(str(top.get("about", "")).split()),
    )
    captions = {str(caption) for caption in data.all_captions()}
    others = [p.text for p in prompts if p.text not in captions]
    if scorer == "judge" and others:
        read.fail(f"the scorer judge knows only captions of the tiny pipeline, not {others[0]!r}; take scorer: vbench")
    return protocol


def _generate(read: _Reader, top: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the pipeline's call, checked as far as one can without a model."""
    generate = read.mapping(top.get("generate"), "generate", None)
    for name in REQUIRED:
        if name not in generate:
            read.fail(f"generate has no {name}; expected {', '.join(REQUIRED)}")
    for name in OURS:
        if name in generate:
            read.fail(f"generate.{name} is set by the command; leave it out")
    for name in REQUIRED[:-1]:
        read.number(generate[name], f"generate.{name}", 1)
    for name in ("guidance_scale", "guidance_scale_2"):
        read.real(generate.get(name, 1.0), f"generate.{name}", 0.0, "; 1 is no guidance")
    read.plain(generate, "generate")
    return dict(generate)


def _lora(read: _Reader, entry: Any) -> Lora:
    found = read.mapping(entry, "lora", ("path", "weight_name", "expert", "scale"))
    if not isinstance(found.get("path"), str):
        read.fail(f"lora has the path {found.get('path')!r}; expected a file, a folder or a name on the hub")
    expert = read.one_of(found.get("expert", "transformer"), "lora.expert", WAN_EXPERTS)
    scale = read.real(found.get("scale", 1.0), "lora.scale", -math.inf)
    beside, name = read.path.parent / found["path"], found.get("weight_name")
    file = beside / str(name) if name and beside.is_dir() else beside
    if not file.exists() and (beside.exists() or found["path"].endswith(".safetensors")):
        read.fail(f"lora names the file {file}, which is not there")
    return Lora(str(beside) if beside.exists() else found["path"], name, expert, scale)


@dataclass(frozen=True)
class _Reader:
    """Checks values of a file, and names it in errors."""

    path: Path

    def fail(self, text: str) -> NoReturn:
        raise CommandError(f"{self.path}: {text}")

    def mapping(self, value: Any, where: str, known: Sequence[str] | None) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            example = ", ".join(known or REQUIRED)
            self.fail(f"{where or 'the file'} is {_short(value)}; expected keys with values: {example}")
        for key in value if known is not None else ():
            if key not in (known or ()):
                self.fail(f"{where + '.' if where else ''}{key} is unknown; expected {', '.join(known or ())}")
        return value

    def items(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            self.fail(f"{where} is {_short(value)}; expected a list of at least one")
        return value

    def number(self, value: Any, where: str, least: int) -> int:
        if type(value) is not int or value < least:
            self.fail(f"{where} is {value!r}; expected a whole number, at least {least}")
        return value

    def real(self, value: Any, where: str, least: float, more: str = "") -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            at_least = f", at least {least:g}" if math.isfinite(least) else ""
            self.fail(f"{where} is {value!r}; expected a finite number{at_least}{more}")
        return float(value)

    def plain(self, values: Mapping[str, Any], where: str) -> None:
        """Check that a run can be stored and compared: numbers that are finite, texts, lists and mappings of them."""
        for name, value in values.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                self.fail(f"{where}.{name} is {value!r}; expected texts, finite numbers, or lists or mappings of them")

    def one_of(self, value: Any, where: str, known: Sequence[str]) -> str:
        if value not in known:
            self.fail(f"{where} has {value!r}; expected one of {', '.join(known)}")
        return value

    def prompts(self, value: Any, where: str) -> tuple[Prompt, ...]:
        """Return prompts that are listed, or the lines of a text file."""
        if isinstance(value, str):
            file = self.path.parent / value
            if not file.is_file():
                self.fail(f"{where} names the file {file}, which is not there; expected one prompt a line, or a list")
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                self.fail(f"{where} names the file {file}, which is no text in UTF-8: {error}")
            value = [line.strip() for line in lines if line.strip()]
        found = tuple(self._prompt(entry, where) for entry in self.items(value, where))
        texts = [prompt.text for prompt in found]
        if len(set(texts)) != len(texts):
            self.fail(f"{where} holds {next(t for t in texts if texts.count(t) > 1)!r} twice; expected distinct texts")
        return found

    def _prompt(self, entry: Any, where: str) -> Prompt:
        if isinstance(entry, Mapping):
            self.mapping(entry, where, ("prompt", "image"))
            image = self.path.parent / str(entry.get("image"))
            if "image" in entry:
                try:
                    with Image.open(image) as opened:
                        opened.verify()
                except (OSError, SyntaxError) as error:  # of Pillow, for what is no image
                    self.fail(f"{where} names the image {image}, which does not open: {error}")
            text, file = entry.get("prompt"), image if "image" in entry else None
        else:
            text, file = entry, None
        if not isinstance(text, str) or not text.strip():
            self.fail(f"{where} holds {_short(text)}; expected a text, or {{prompt: a text, image: a file}}")
        return Prompt(text.strip(), file)


def _short(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where PyYAML takes the last."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node] | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node
