"""``tahf4 calibrate``: from a pipeline and some prompts to a recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..recipe.entries import AttentionEntry

__all__ = ["Dtype", "MaskKind", "calibrate"]


class MaskKind(StrEnum):
    """How the channel masks are made."""

    network_search = "network_search"
    layer_search = "layer_search"
    percentile = "percentile"
    max = "max"
    rms = "rms"
    none = "none"
    weights = "weights"


class Dtype(StrEnum):
    """In which precision the original runs."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def calibrate(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a saved diffusers pipeline.")],
    context: typer.Context,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt a line; needed unless --mask weights.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The recipe, a safetensors file.")] = Path(
        "recipe.safetensors"
    ),
    mask: Annotated[
        MaskKind,
        typer.Option(help="How channel masks are made. weights: of the weights alone, no prompt is needed or run."),
    ] = MaskKind.network_search,
    percentile: Annotated[
        float | None, typer.Option(help="Of |x|, for --mask percentile and network_search; 99.9 by default.")
    ] = None,
    weight_exponent: Annotated[
        float | None, typer.Option(help="Alpha, for --mask percentile, max, rms and weights; 0.5 by default.")
    ] = None,
    no_rotation: Annotated[bool, typer.Option("--no-rotation", help="Do not rotate.")] = False,
    keep_linears: Annotated[
        int | None, typer.Option(min=0, help="Linears of each expert to keep in high precision, by measured effect.")
    ] = None,
    keep_blocks: Annotated[
        int | None, typer.Option(min=0, help="Blocks of each expert to keep in high precision, by measured effect.")
    ] = None,
    activation_bits: Annotated[int, typer.Option(help="Of all activations: 4 (HiF4), 8 (int8) or 16.")] = 4,
    max_8bit_flops: Annotated[
        float | None,
        typer.Option(help="Share of the FLOPs, 0 to 1, whose activations may have 8 bits, by measured effect."),
    ] = None,
    protect_bits: Annotated[
        int | None,
        typer.Option(help="Protect linears by activations of so many bits, 8 or 16, instead of by high precision."),
    ] = None,
    low_rank: Annotated[
        float | None,
        typer.Option(help="Rank of a branch beside each 4-bit product, in percent of the weight's smaller side."),
    ] = None,
    scale_span: Annotated[
        str,
        typer.Option(help="Units of 64 values of a row that share a level-1 scale: 1, 2, 4, row, or auto: by error."),
    ] = "1",
    span_tolerance: Annotated[
        float | None,
        typer.Option(help="Of --scale-span auto: dB that linears' output error may be above that of a scale a unit."),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="half_away, bfloat16_half_away as hardware for HiF4 does, or least_error, the default."),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="int8 measures each attention in 8 bits, and keeps what is above the tolerance as it is; hif4 "
            "measures it with q and k in HiF4 as well."
        ),
    ] = None,
    attention_value_bits: Annotated[
        int, typer.Option(help="Of its values and probabilities when it is measured: 8, or 16, which GPUs alone run.")
    ] = 8,
    attention_tolerance: Annotated[
        float, typer.Option(min=0, help="Relative squared error of an attention's output.")
    ] = 0.01,
    high_precision_step: Annotated[
        list[int] | None,
        typer.Option(help="Index of a denoising step in high precision, negative from the end; repeat it for more."),
    ] = None,
    step_activation_bits: Annotated[
        int | None,
        typer.Option(help="In these steps weights stay in HiF4, and activations have so many bits, 8 or 16."),
    ] = None,
    step_groups: Annotated[int, typer.Option(min=1, help="Parts of the schedule whose statistics are apart.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of a video.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Height of a frame in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Width of a frame in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another argument of the pipeline's call, NAME=VALUE, such as guidance_scale=3.5."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the original.")] = Dtype.bfloat16,
    no_inductor: Annotated[bool, typer.Option("--no-inductor", help="Run captured graphs as they are.")] = False,
) -> None:
    """Generate a video for each prompt, watch the activations, and write a recipe.

    The statistics are kept beside the recipe (`.calibration`) after each prompt, so that a run that is stopped
    takes up after the last one. In Python the recipe is applied with
    `tahf4.apply_recipe(pipe, tahf4.Recipe.load("recipe.safetensors"))`.
    """
    import torch

    from ..calibration.calibration import calibrate as observe
    from ..calibration.choices import check_choices
    from .errors import CommandError
    from .generation import load_any_pipeline
    from .staging import check_writable
    from .tiny_wan import settings

    if mask is MaskKind.weights:
        _from_weights(
            context, model_dir, out, 0.5 if weight_exponent is None else weight_exponent, no_rotation, dtype
        )
        return
    if prompts is None:
        raise CommandError("give --prompts FILE, one prompt a line; --mask weights needs none")
    if not prompts.is_file():
        raise CommandError(f"there is no file {prompts}; give a text file with one prompt a line")
    lines = list(dict.fromkeys(line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()))
    lines = [line for line in lines if line]
    if not lines:
        raise CommandError(f"{prompts} holds no prompt; expected one a line")
    shipped = model_dir.resolve() == settings.PIPELINE_DIR.resolve()
    call: dict[str, Any] = dict(settings.GENERATION) if shipped else {}
    overrides = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    call |= {name: value for name, value in overrides.items() if value is not None}
    call |= dict(map(_argument, arguments or []))
    choices: dict[str, Any] = {
        "mask": None if mask is MaskKind.none else mask.value,
        "percentile": percentile,
        "weight_exponent": weight_exponent,
        "activation_bits": activation_bits,
        "protect_bits": protect_bits,
        "low_rank": low_rank,
        "scale_span": int(scale_span) if scale_span.isdigit() else scale_span,
        "rounding": rounding,
        "attention": attention,
        "attention_tolerance": attention_tolerance,
        "high_precision_steps": high_precision_step or [],
        "step_activation_bits": step_activation_bits,
    }
    if span_tolerance is not None:
        choices["span_tolerance"] = span_tolerance
    if keep_linears is not None:
        choices["max_high_precision_linears"] = keep_linears
    if keep_blocks is not None:
        choices["max_high_precision_blocks"] = keep_blocks
    if max_8bit_flops is not None:
        choices["max_8bit_flops"] = max_8bit_flops
    check_choices(**choices)  # before hours of generation, not after
    check_writable(out)
    pipe = load_any_pipeline(model_dir, getattr(torch, dtype.value), "cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(desc="steps", leave=False, position=1)
    checkpoint = out.with_name(f"{out.name}.calibration")
    options = {"inductor": not no_inductor, "attention.value_bits": attention_value_bits}
    with observe(pipe, step_groups=step_groups, checkpoint=checkpoint, options=options) as calibration:
        calibration.run(lines, **call)
    recipe = calibration.recipe(rotate=not no_rotation, **choices)
    recipe.save(out)
    for expert in recipe.experts:
        linears = recipe.linears(expert)
        kept = [path for path, linear in linears.items() if linear.decision != "hif4"]
        worst = sorted(linears, key=lambda p: -(linears[p].effect or 0))[:5]
        others = Counter(linear.activation_bits for path, linear in linears.items() if path not in kept)
        more = ", ".join(f"{others[bits]} with activations in {bits} bits" for bits in sorted(others) if bits != 4)
        words = f" ({more})" if more else ""
        typer.echo(f"{expert}: {len(linears) - len(kept)} linears in HiF4{words}, {len(kept)} in high precision")
        for path in worst:
            typer.echo(f"  {path}: {linears[path].decision}, {linears[path].reason}")
        for line in _attention_lines(expert, recipe.attention.get(expert, {})):
            typer.echo(line)
    typer.echo(f"Written to {out} ({out.stat().st_size:,} bytes); statistics in {checkpoint}")


def _from_weights(
    context: typer.Context, model_dir: Path, out: Path, exponent: float, no_rotation: bool, dtype: Dtype
) -> None:
    """Write a recipe of the weights alone."""
    import torch

    from ..calibration.from_weights import recipe_from_weights
    from .errors import CommandError
    from .generation import load_any_pipeline
    from .staging import check_writable

    taken = {"model_dir", "out", "mask", "weight_exponent", "no_rotation", "dtype"}
    given = [
        parameter.opts[-1]
        for parameter in context.command.params
        if (name := parameter.name) is not None and name not in taken
        and (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]  # fmt: skip
    if given:
        options = ", ".join(given)
        raise CommandError(f"--mask weights runs nothing and takes no {options}; leave it out, or choose another mask")
    check_writable(out)
    pipe = load_any_pipeline(model_dir, getattr(torch, dtype.value), "cpu")
    recipe = recipe_from_weights(pipe, weight_exponent=exponent, **({"block": 0} if no_rotation else {}))
    recipe.save(out)
    for expert, entries in recipe.experts.items():
        count = len(recipe.linears(expert))
        typer.echo(f"{expert}: {count} linears in HiF4, {len(entries)} masks of the weights alone")
    typer.echo(f"Written to {out} ({out.stat().st_size:,} bytes)")


def _attention_lines(expert: str, attentions: Mapping[str, AttentionEntry]) -> Iterator[str]:
    """Yield how many attentions may run in 8 bits, and the numbers of those of the greatest effect."""
    if attentions:
        low = [entry.decision for entry in attentions.values() if entry.decision != "high_precision"]
        hif4 = f", {low.count('hif4')} of them with q and k in HiF4" if "hif4" in low else ""
        high = len(attentions) - len(low)
        yield f"{expert}: {len(low)} attentions may run in 8 bits{hif4}, {high} stay in high precision"
    for path in sorted(attentions, key=lambda p: -(attentions[p].effect or 0))[:5]:
        yield f"  {path}: {attentions[path].words}"


def _argument(text: str) -> tuple[str, Any]:
    """Return name and value of ``NAME=VALUE``; the value is JSON, or a text."""
    from .errors import CommandError

    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise CommandError(f"--set {text!r}; expected NAME=VALUE, such as --set guidance_scale=3.5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
