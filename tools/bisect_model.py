"""``tahf4 bisect``: which pass, then which linear, adds most of the error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..graph_capture.captured import Capture

__all__ = ["bisect", "captures"]


def bisect(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a saved diffusers pipeline or transformer, or an exported .pt2. Default: the tiny Wan2.2."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe, as `tahf4 calibrate` writes it.")] = None,
    expert: Annotated[
        str | None,
        typer.Option(help="Component of a pipeline, such as transformer_2 (default: all); of a recipe, for one model."),
    ] = None,
    blame: Annotated[str | None, typer.Option("--pass", help="Look into this pass, whatever the others add.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many linears to name.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    prompt: Annotated[str, typer.Option(help="What the pipeline generates.")] = "a red circle moving right",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; each expert is caught in its first.")] = 4,
    height: Annotated[int | None, typer.Option(min=8, help="Height of a frame in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Width of a frame in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="For a transformer alone: FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH of the latent, not pixels."),
    ] = None,
    disable: Annotated[list[str] | None, typer.Option("--disable", help="Leave this pass out.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for reproducer scripts.")] = Path("bisect"),
) -> None:
    """Name the pass, then the linears, that add most of the error against high precision.

    Runs each graph before and after every pass: on the inputs of a denoising step of a pipeline, on the example inputs
    of an exported program, or on random numbers for a transformer alone. Writes a script that runs the smallest
    failing subgraph alone.
    """
    from ..debugging.bisect import bisect as search
    from ..errors import OptionError
    from .tiny_wan import settings

    path = model if model is not None else settings.PIPELINE_DIR
    call = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    overrides = {name: value for name, value in call.items() if value is not None}
    options = {"disable_passes": list(disable or [])}
    for name, captured in captures(path, prompt, seed, overrides, recipe, expert, shape).items():
        found = search(captured, options=options, blame=blame, rounds=rounds)
        typer.echo(f"{name}\n{found.text()}")
        try:
            script = found.write_reproducer(out / f"{name.replace('.', '_')}.py")
        except OptionError:
            continue
        typer.echo(f"Run the smallest failing subgraph alone: python {script}\n")


def captures(
    path: Path,
    prompt: str,
    seed: int,
    overrides: dict[str, Any],
    recipe: Path | None,
    expert: str | None,
    shape: str | None = None,
) -> dict[str, Capture]:
    """Capture an exported program, a transformer, or each expert of a pipeline with the inputs of its first call.

    Raises:
        CommandError: the path holds none of them, an option does not fit it, or the pipeline never called the expert.
    """
    from .errors import CommandError

    alone = path.is_dir() and not (path / "model_index.json").is_file() and (path / "config.json").is_file()
    if shape is not None and not alone:
        raise CommandError(f"--shape is for the folder of a transformer alone, with its config.json; {path} is none")
    if path.suffix == ".pt2":
        if recipe is not None or expert is not None:
            raise CommandError("an exported program takes no --recipe and no --expert; give the pipeline's folder")
        return {path.stem: _exported(path)}
    if alone:
        return {path.resolve().name: _alone(path, seed, recipe, expert, shape)}
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise CommandError(
            f"{path} has no model_index.json and no config.json; give the folder of a pipeline or a transformer, or an "
            "exported .pt2"
        )
    return _experts(path, prompt, seed, overrides, recipe, expert)


def _alone(path: Path, seed: int, recipe: Path | None, expert: str | None, shape: str | None) -> Capture:
    import dataclasses

    import torch

    from ..graph_capture.export import capture
    from ..recipe.apply import apply_recipe
    from ..recipe.recipe import Recipe
    from .errors import CommandError
    from .inspection.sources import loaded, recipe_part

    if recipe is None and expert is not None:
        raise CommandError(f"{path} holds one model: --expert says which part of a --recipe is its own")
    known = Recipe.load(recipe) if recipe is not None else None
    part = expert if expert is not None else recipe_part("", path, known)
    if known is not None and part not in known.experts:
        raise CommandError(f"{recipe} has parts for {', '.join(known.experts)}; say which with --expert")
    torch.manual_seed(seed)
    model, arguments = loaded(path, torch.float32, shape)
    if known is not None:
        # Which steps run in high precision is no property of the graph.
        apply_recipe(model, dataclasses.replace(known, high_precision_steps=()), expert=part)
    return capture(model, (), arguments)


def _exported(path: Path) -> Capture:
    from ..graph_capture.export import capture_program
    from .exported import load_program

    return capture_program(load_program(path))


def _experts(
    path: Path, prompt: str, seed: int, overrides: dict[str, Any], recipe: Path | None, expert: str | None
) -> dict[str, Capture]:
    import torch
    from torch import nn

    from ..graph_capture.export import capture
    from ..model.components import experts
    from ..recipe.apply import apply_recipe
    from ..recipe.recipe import Recipe
    from .errors import CommandError
    from .generation import load_any_pipeline
    from .tiny_wan import settings

    pipe = load_any_pipeline(path, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    if recipe is not None:
        apply_recipe(pipe, Recipe.load(recipe))
    models = experts(pipe)
    wanted = [expert] if expert is not None else list(models)
    if expert is not None and expert not in models:
        raise CommandError(f"{path} has no {expert!r}; it has {', '.join(models)}")
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, kwargs))

        return models[name].register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [watch(name) for name in wanted]
    settled = dict(settings.GENERATION) if path.resolve() == settings.PIPELINE_DIR.resolve() else {}
    try:
        generator = torch.Generator().manual_seed(seed)
        pipe(prompt=prompt, generator=generator, output_type="latent", **{**settled, **overrides})
    except (TypeError, ValueError) as error:
        raise CommandError(f"the pipeline refuses these arguments: {error}") from error
    finally:
        for handle in hooks:
            handle.remove()
    missing = [name for name in wanted if name not in calls]
    if missing:
        raise CommandError(f"no step called {', '.join(missing)}; take more --steps")
    found = {}
    for name in wanted:
        args, kwargs = calls[name]
        # What selects a path through forward (return_dict=False) is a constant of the graph.
        found[name] = capture(models[name], args, kwargs)
    return found
