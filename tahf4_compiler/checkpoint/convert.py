"""From a model folder to one with packed linears, as a stream (:func:`quantize_checkpoint`)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import CheckpointError, RecipeError
from ..files.reading import read_header
from ..format.spans import joined, span_name
from ..options import rounding as check_rounding
from ..options import scale_span as check_scale_span
from ..packed.attention import attention_words
from ..packed.config import TaHF4Config
from ..packed.plan import plan_modules, plan_transforms
from ..pipeline.context import Decision
from ..recipe.apply import recipe_attention
from ..recipe.recipe import Recipe
from .fp4 import paths_of
from .layout import Shard, shards_of
from .manifest import NAME, file_sha256, manifest_text, read_manifest, verify
from .source import Component, Source, open_source
from .stage import Stage, drop_list, staged
from .stream import Workers, write_shard

__all__ = ["Converted", "quantize_checkpoint"]

_COPY = 4 << 20


@dataclass
class Converted:
    """What a conversion did.

    Attributes:
        plans: one decision for each linear, by component.
        bytes_read: of weights and copied files, in this run.
        bytes_written: in this run.
        resumed: files that an earlier run had finished.
        held: the format in which another tool held weights, such as ``"NVFP4"``, by component.
        losses: of these weights, the relative error of HiF4 against the values that they stood for, by module path
            and component; of those that were packed in this run.
        complete: the folder was there already, made of the same files in the same way; nothing was written.
    """

    plans: dict[str, list[Decision]] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    resumed: int = 0
    complete: bool = False
    held: dict[str, str] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class _Part:
    component: Component
    plan: list[Decision]
    shards: list[Shard]
    texts: dict[str, str]
    sums: Mapping[str, int]


def quantize_checkpoint(
    model_dir: str | Path,
    out_dir: str | Path,
    recipe: Recipe | None = None,
    *,
    expert: str | None = None,
    keep: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    check_weights: bool = True,
    shard_size: int = 2 << 30,
    hard_link: bool = False,
    threads: int | None = None,
    rounding: str = "half_away",
    scale_span: int | str = 1,
) -> Converted:
    """Quantize a model on disk: what :func:`tahf4_compiler.quantize_` makes of it, bit for bit, in bounded memory.

    The new folder grows beside its place and is renamed when it is whole. A run that was stopped, in whatever way,
    is taken up after the last finished file when it is called again with the same arguments.

    Args:
        model_dir: a diffusers pipeline or model in safetensors, or a model with the original Wan names. Weights may be
            in NVFP4 or MXFP4 (:mod:`tahf4_compiler.checkpoint.fp4`): HiF4 is made of the values that they stand for.
        out_dir: new or empty, or a link to an empty folder. One that this call made before is read and compared with
            its manifest.
        recipe: see :class:`tahf4_compiler.Recipe`, or None for a rotation that needs no data.
        expert: which expert's part of the recipe belongs to a bare model.
        keep: regular expressions, searched in module paths: linears that stay in high precision.
        dtype: that floating-point tensors are cast to first, as ``from_pretrained(torch_dtype=...)`` does.
        check_weights: compare the weights with those that were calibrated.
        shard_size: bytes of a file of weights.
        hard_link: link files that do not change instead of copying them.
        threads: that read and pack; None for one a core, four at most.
        rounding: as for :func:`tahf4_compiler.quantize_`.
        scale_span: the same.

    Raises:
        CheckpointError: something cannot be read or written; ``out_dir`` is as it was.
        RecipeError: the recipe belongs to another model; ``out_dir`` is as it was.
        PatternError: a pattern of ``keep`` matches nothing.
        OptionError: rounding or span is unknown, or they do not go together.
    """
    form = joined(check_scale_span("scale_span", scale_span), check_rounding("rounding", rounding, scale_span))
    folder, out = Path(model_dir), Path(os.path.abspath(out_dir))
    if out.is_symlink() and out.exists():
        out = out.resolve()  # the folder is renamed, and a link cannot be replaced by one
    source = open_source(folder, dtype)
    parts = _parts(source, recipe, expert, keep, check_weights, shard_size, form)
    job = _job(source, parts)
    result = Converted({part.component.name: part.plan for part in parts})
    result.held = {part.component.name: part.component.held for part in parts if part.component.held}
    if _stands(out, job):
        result.complete = True
        return result
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(f"{out} lies in {folder}, which is read; name a folder elsewhere")
    before = torch.get_num_threads()
    try:
        with staged(out, job) as stage:
            result.resumed = len(stage.done)
            _write_all(stage, source, parts, result, hard_link, threads or min(4, os.cpu_count() or 1))
            stage.write(NAME, manifest_text(job, stage.done).encode())
    finally:
        torch.set_num_threads(before)
    return result


def _parts(
    source: Source,
    recipe: Recipe | None,
    expert: str | None,
    keep: Sequence[str],
    check_weights: bool,
    limit: int,
    form: int,
) -> list[_Part]:
    names = [component.name for component in source.components]
    if recipe is not None and names != [""] and (missing := sorted(set(recipe.experts) - set(names))):
        raise RecipeError(f"the recipe has the expert {missing[0]!r}; {source.folder} has {', '.join(names)}")
    parts = []
    for component in source.components:
        mine, name = recipe, expert
        if component.name:
            mine, name = (recipe, component.name) if recipe and component.name in recipe.experts else (None, None)
        plan = plan_modules(component.model, mine, keep, expert=name)
        transforms = plan_transforms(component.model, plan, mine, expert=name, span=form)
        shards, index = shards_of(component, plan, transforms, limit)
        chosen = {d.module: d for d in plan if d.module in transforms}
        attention = recipe_attention(component.model, mine, expert=name) if mine is not None else {}
        linears = {
            path: {
                "k": d.k,
                "n": d.n,
                "hadamard_block": transforms[path].hadamard_block,
                "activation": transforms[path].activation,
                "dtype": str(component.model.get_submodule(path).weight.dtype).removeprefix("torch."),
                **({} if transforms[path].multiplies else {"multiplier": False}),
                **({} if d.activation_bits == 4 else {"activation_bits": d.activation_bits}),
                **({"rank": d.rank} if d.rank else {}),
                **({"scale_span": span_name(d.span)} if d.span != 1 else {}),
                **({"rounding": d.rounding} if d.rounding != "half_away" else {}),
                **attention_words(attention.get(path)),
            }
            for path, d in chosen.items()
        }
        settings = TaHF4Config(mine, keep=keep, expert=name, linears=linears).to_dict()
        prefix = f"{component.name}/" if component.name else ""
        config = {**component.config, "quantization_config": settings}
        texts = {f"{prefix}config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}
        if index is not None:
            texts[f"{prefix}diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
        sums: dict[str, int] = {}
        if mine is not None and check_weights:
            part = name if name is not None else next(iter(mine.experts), "")
            sums = {path: linear.weight_sum for path, linear in mine.linears(part).items()}
        parts.append(_Part(component, plan, shards, texts, sums))
    return parts


def _job(source: Source, parts: list[_Part]) -> str:
    """Return a hash of what is converted and how: files by name, size and time, headers, settings and transforms."""
    found = hashlib.sha256()
    files = {path for part in parts for info in part.component.tensors.values() for path in paths_of(info)}
    for path in sorted([*files, *source.others.values()]):
        state = path.stat()
        found.update(f"{path.relative_to(source.folder)}|{state.st_size}|{state.st_mtime_ns}\n".encode())
    for path in sorted(files):
        found.update(read_header(path).text)
    for part in parts:
        for name, text in part.texts.items():
            found.update(f"{name}|{text}\n".encode())
        for shard in part.shards:
            found.update(shard.header)
            for item in shard.items:
                settings = f"{item.outputs[0][0]}|{item.dtype}|{part.sums.get(item.path)}|{item.transform}\n"
                found.update(settings.encode())
                values = [item.value]
                if item.transform is not None:
                    values = [item.transform.mask, item.transform.second_moment, *(item.transform.low_rank or ())]
                    if (rounded := item.transform.reconstruction) is not None:
                        values += [rounded.packed.codes, rounded.packed.scales]
                for value in values:
                    if value is not None:
                        plain = value.detach().cpu()
                        found.update((plain.float() if plain.is_floating_point() else plain).numpy().tobytes())
    return found.hexdigest()


def _stands(out: Path, job: str) -> bool:
    """Whether the folder is there already, made by the same job, and still what was written.

    Raises:
        CheckpointError: something else is there, or files were damaged since.
    """
    if not os.path.lexists(out):
        return False
    there, what = f"{out} is there already and", "remove it or name another folder"
    if out.is_symlink():
        raise CheckpointError(f"{out} is a link to {os.readlink(out)}, which is not there; {what}")
    if not out.is_dir():
        raise CheckpointError(f"{there} is no folder; {what}")
    if not any(out.iterdir()):
        return False
    if not (out / NAME).exists():
        raise CheckpointError(f"{there} holds something else; {what}")
    try:
        made, files = read_manifest(out)
        if made == job:
            drop_list(out)
            total = sum(size for size, _ in files.values())
            with tqdm(total=total, desc="compare", unit="B", unit_scale=True, delay=1.0) as bar:
                verify(out, bar.update)
    except CheckpointError as cause:
        raise CheckpointError(
            f"nothing was written, since {out} is there already and not what this command makes: "
            f"{str(cause).rstrip('.')}. {what.capitalize()}."
        ) from cause
    if made != job:
        raise CheckpointError(f"{there} was made of other files or with other options; {what}")
    return True


def _write_all(
    stage: Stage, source: Source, parts: list[_Part], result: Converted, hard_link: bool, threads: int
) -> None:
    others = {name: path for name, path in source.others.items() if name not in stage.done}
    weights = [(part, shard) for part in parts for shard in part.shards]
    todo = [(part, shard) for part, shard in weights if shard.name not in stage.done]
    needed = sum(shard.size for _, shard in todo)
    needed += 0 if hard_link else sum(path.stat().st_size for path in others.values())
    if needed > (free := shutil.disk_usage(stage.folder).free):
        raise OSError(28, f"{needed:,} bytes are needed and {free:,} free")
    total = sum(s.read for _, s in weights) + sum(path.stat().st_size for path in source.others.values())
    left = sum(s.read for _, s in todo) + sum(path.stat().st_size for path in others.values())
    with tqdm(total=total, initial=total - left, desc="quantize", unit="B", unit_scale=True, delay=1.0) as bar:

        def progress(count: int) -> None:
            result.bytes_read += count
            bar.update(count)

        for part in parts:
            workers = Workers(threads, part.sums)
            try:
                for shard in part.shards:
                    if shard.name not in stage.done:
                        found = write_shard(shard, stage.partial(shard.name), workers, progress)
                        stage.finish(shard.name, found)
                        result.bytes_written += found[0]
            finally:
                workers.close()
            workers.flaws.warn(part.component.name)
            if found_losses := workers.losses.relative():
                result.losses[part.component.name] = found_losses
            for name, text in part.texts.items():
                stage.write(name, text.encode())
        for name, path in others.items():
            stage.finish(name, _copy(path, stage.partial(name), hard_link, progress))
            result.bytes_written += 0 if hard_link else stage.done[name][0]


def _copy(path: Path, place: Path, hard_link: bool, progress: Callable[[int], Any]) -> tuple[int, str]:
    """Copy or link a file; return its size and SHA-256."""
    if hard_link:
        os.link(path.resolve(), place)
        return file_sha256(place, progress)
    found, size, buffer = hashlib.sha256(), 0, bytearray(_COPY)
    with path.open("rb", buffering=0) as source, place.open("wb", buffering=0) as out:
        while count := source.readinto(buffer):
            data = memoryview(buffer)[:count]
            found.update(data)
            size += count
            progress(count)
            while len(data):
                data = data[out.write(data) :]
    return size, found.hexdigest()
