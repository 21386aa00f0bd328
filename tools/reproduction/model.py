"""The pipeline of a reproduction: where it is, what its configuration says, and how it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from ...files.reading import read_json
from ...model.components import WAN_EXPERTS
from ..errors import CommandError
from ..generation import WAN_PIPELINES, class_of, load_pipeline
from .protocol import Protocol, file_digest

__all__ = ["Prompted", "Structure", "check_fits", "digests", "local_folder", "open_pipeline", "structure"]

HINT = "Give a folder that `pipe.save_pretrained` wrote, or a name on the hub such as Wan-AI/Wan2.2-T2V-A14B-Diffusers."


@dataclass(frozen=True)
class Structure:
    """What the configuration of a pipeline of Wan says.

    Attributes:
        pipeline: name of its class.
        index: its model_index.json.
        components: configuration of each component that has one.
    """

    pipeline: str
    index: dict[str, Any]
    components: dict[str, dict[str, Any]]

    @property
    def experts(self) -> list[str]:
        """Names of the transformers."""
        return [name for name in WAN_EXPERTS if name in self.components]

    @property
    def multiple(self) -> int:
        """Pixels that each side of a frame is a multiple of."""
        patch = self.components["transformer"]["patch_size"][1]
        # The pipeline asks for multiples of 16 whatever its autoencoder is.
        return max(16, int(self.components["vae"].get("scale_factor_spatial", 8)) * int(patch))

    @property
    def frames(self) -> int:
        """Frames that one frame of latents stands for, but for the first."""
        return int(self.components["vae"].get("scale_factor_temporal", 4))

    def tokens(self, protocol: Protocol) -> int:
        """Return the tokens of a clip."""
        patch = self.components["transformer"]["patch_size"]
        scale = int(self.components["vae"].get("scale_factor_spatial", 8))
        sizes = protocol.generate
        latents = (sizes["num_frames"] - 1) // self.frames + 1, sizes["height"] // scale, sizes["width"] // scale
        return int((latents[0] // patch[0]) * (latents[1] // patch[1]) * (latents[2] // patch[2]))


def local_folder(source: str, *, weights: bool) -> Path:
    """Return the folder of a pipeline; one on the hub is downloaded to the cache of the hub.

    Args:
        source: a folder, or a name on the hub.
        weights: with them; without, only configurations are downloaded.

    Raises:
        CommandError: there is no such folder, and it is no name on the hub or the hub does not give it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if source.count("/") != 1 or path.exists() or source.startswith((".", "/")):
        raise CommandError(f"there is no folder {source}. {HINT}")
    try:
        if weights:
            return Path(diffusers.DiffusionPipeline.download(source))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=["*.json"]))
    except Exception as error:  # of the network and its libraries
        raise CommandError(f"{source} is no folder here, and the hub does not give it: {error}. {HINT}") from error


def structure(folder: Path) -> Structure:
    """Read the configuration of a pipeline.

    Raises:
        CommandError: the folder holds no pipeline of Wan.
    """
    name = class_of(folder, HINT)
    if name not in WAN_PIPELINES:
        raise CommandError(f"{folder} is a {name}; expected {' or '.join(WAN_PIPELINES)}. {HINT}")
    index = read_json(folder / "model_index.json", CommandError)
    components = {}
    for part in (*WAN_EXPERTS, "text_encoder", "image_encoder", "vae"):
        if (folder / part / "config.json").is_file():
            components[part] = read_json(folder / part / "config.json", CommandError)
    for part in ("transformer", "text_encoder", "vae"):
        if part not in components:
            raise CommandError(f"{folder} has no {part}/config.json. {HINT}")
    return Structure(name, index, components)


def check_fits(protocol: Protocol, found: Structure) -> None:
    """Check that a pipeline can generate what a protocol says.

    Raises:
        CommandError: it cannot.
    """
    sizes, multiple, scale = protocol.generate, found.multiple, found.frames
    for side in ("height", "width"):
        if sizes[side] % multiple:
            near = max(1, round(sizes[side] / multiple)) * multiple
            raise CommandError(f"generate.{side} is {sizes[side]}; expected a multiple of {multiple}, such as {near}")
    if (sizes["num_frames"] - 1) % scale:
        near = (sizes["num_frames"] - 1) // scale * scale + 1
        raise CommandError(
            f"generate.num_frames is {sizes['num_frames']}; expected one more than a multiple of {scale}, such as "
            f"{near}"
        )
    if "guidance_scale_2" in sizes and found.index.get("boundary_ratio") is None:
        raise CommandError("generate.guidance_scale_2 is for a second expert, and this pipeline has one; leave it out")
    known = set(inspect.signature(getattr(diffusers, found.pipeline).__call__).parameters)
    for name in sizes:
        if name not in known:
            raise CommandError(f"generate.{name} is no argument of {found.pipeline}; expected some of {sorted(known)}")
    wants = found.pipeline == "WanImageToVideoPipeline"
    for prompt in (*protocol.prompts, *protocol.calibration_prompts):
        if wants and prompt.image is None:
            raise CommandError(
                f"{found.pipeline} starts from an image, and the prompt {prompt.text!r} has none; write it as "
                "{prompt: TEXT, image: FILE}"
            )
        if prompt.image is not None and not wants:
            raise CommandError(f"{found.pipeline} takes no image, and the prompt {prompt.text!r} has one; leave it out")
    for part in protocol.lora:
        if part.expert not in found.experts:
            raise CommandError(f"lora is for {part.expert}; this pipeline has {', '.join(found.experts)}")
    if protocol.scheduler:
        _check_scheduler(protocol.scheduler, found)


def _check_scheduler(settings: Mapping[str, Any], found: Structure) -> None:
    """Check the names; whether the values fit is known once the scheduler is made."""
    name = settings.get("class") or (found.index.get("scheduler") or [None, None])[1]
    if not (isinstance(name, str) and name.endswith("Scheduler") and hasattr(diffusers, name)):
        example = "FlowMatchEulerDiscreteScheduler"
        raise CommandError(f"scheduler.class is {name!r}; expected a scheduler of diffusers, such as {example}")
    known = [*inspect.signature(getattr(diffusers, name)).parameters]
    for setting in settings:
        if setting not in ("class", *known):
            raise CommandError(f"scheduler.{setting} is no setting of {name}; expected some of {', '.join(known)}")


def digests(folder: Path, former: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the sha256 of every file of a pipeline.

    Only model_index.json and the folders that it names are read: others do not change what is generated.

    Args:
        folder: of the pipeline.
        former: the second result of a former call; a file that is as it was then is not read again.

    Returns:
        By the name in the folder; and by the absolute path, size, inode and times of the last change (of the content
        and of the inode, in ns).
    """
    index = folder / "model_index.json"
    parts = [folder / name for name in read_json(index, CommandError)]
    by_name, by_state = {}, {}
    paths = [index, *(path for part in parts for path in sorted(part.rglob("*")) if path.is_file())]
    for path in tqdm(paths, desc="digests of the model", unit="file", delay=2, leave=False):
        stat = path.stat()
        state = f"{path.absolute()} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        digest = former.get(state) or file_digest(path)
        by_name[path.relative_to(folder).as_posix()] = by_state[state] = digest
    return by_name, by_state


class Prompted:
    """A pipeline that is called with a prompt, and finds the image that belongs to it by itself."""

    def __init__(self, pipe: Any, protocol: Protocol) -> None:
        """Wrap a pipeline; attributes are those of the pipeline."""
        self._pipe = pipe
        prompts = (*protocol.prompts, *protocol.calibration_prompts)
        self._images = {prompt.text: prompt.image for prompt in prompts if prompt.image is not None}

    def __getattr__(self, name: str) -> Any:
        """Return what the pipeline has."""
        return getattr(self._pipe, name)

    def __call__(self, prompt: str, **arguments: Any) -> Any:
        """Call the pipeline."""
        if prompt in self._images:
            arguments["image"] = diffusers.utils.load_image(str(self._images[prompt]))
        return self._pipe(prompt=prompt, **arguments)


def open_pipeline(folder: Path, protocol: Protocol) -> Any:
    """Load a pipeline to the CPU, with the scheduler and the LoRA weights of a protocol.

    Raises:
        CommandError: it does not load, or a LoRA does not fit.
    """
    pipe = load_pipeline(folder, getattr(torch, protocol.dtype), "cpu", WAN_PIPELINES)
    if protocol.scheduler:
        settings = dict(protocol.scheduler)
        name = settings.pop("class", type(pipe.scheduler).__name__)
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
        except Exception as error:  # of diffusers, for whatever a setting can be
            raise CommandError(f"{name} does not take the settings {settings}: {error}") from error
    for part in protocol.lora:
        named = {"weight_name": part.weight_name} if part.weight_name else {}
        try:
            pipe.load_lora_weights(part.path, load_into_transformer_2=part.expert == WAN_EXPERTS[1], **named)
            if not getattr(getattr(pipe, part.expert), "peft_config", None):
                raise ValueError("none of its tensors belongs to this model")
            pipe.fuse_lora(components=[part.expert], lora_scale=part.scale)
            pipe.unload_lora_weights()
        except Exception as error:  # of diffusers and PEFT, for whatever a file can hold
            raise CommandError(
                f"the LoRA {part.path} does not load into {part.expert}: {error}. It needs the package peft, and "
                "weights of this model"
            ) from error
    pipe.set_progress_bar_config(leave=False)
    return pipe
