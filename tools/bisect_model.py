"""``tahf4 bisect``: which pass, then which linear, adds most of the error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..graph_capture import Capture

__all__ = ["bisect", "captures"]


def bisect(
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder of a saved diffusers pipeline, or an exported .pt2. Default: the tiny Wan2.2."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe, as `tahf4 calibrate` writes it.")] = None,
    expert: Annotated[str | None, typer.Option(help="Component, such as transformer_2. Default: all.")] = None,
    blame: Annotated[str | None, typer.Option("--pass", help="Look into this pass, whatever the others add.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many linears to name.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    prompt: Annotated[str, typer.Option(help="What the pipeline generates.")] = "a red circle moving right",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; each expert is caught in its first.")] = 4,
    height: Annotated[int | None, typer.Option(min=8, help="Height of a frame in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Width of a frame in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    disable: Annotated[list[str] | None, typer.Option("--disable", help="Leave this pass out.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for reproducer scripts.")] = Path("bisect"),
) -> None:
    """Name the pass, then the linears, that add most of the error against high precision.

    Runs each graph before and after every pass on real inputs: those of a denoising step of a pipeline, or the example
    inputs of an exported program. Writes a script that runs the smallest failing
    subgraph alone.
    """
    from ..bisection import bisect as search
    from ..errors import OptionError
    from .tiny_wan import settings

    path = model if model is not None else settings.PIPELINE_DIR
    call = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    overrides = {name: value for name, value in call.items() if value is not None}
    options = {"disable_passes": list(disable or [])}
    for name, captured in captures(path, prompt, seed, overrides, recipe, expert).items():
        found = search(captured, options=options, blame=blame, rounds=rounds)
        typer.echo(f"{name}\n{found.text()}")
        try:
            script = found.write_reproducer(out / f"{name.replace('.', '_')}.py")
        except OptionError:
            continue
        typer.echo(f"Run the smallest failing subgraph alone: python {script}\n")


def captures(
    path: Path, prompt: str, seed: int, overrides: dict[str, Any], recipe: Path | None, expert: str | None
) -> dict[str, Capture]:
    """Capture an exported program, or each expert of a pipeline with the inputs of its first call.

    Raises:
        CommandError: the path holds neither, or the pipeline never called the expert.
    """
    from .errors import CommandError

    if path.suffix == ".pt2":
        if recipe is not None or expert is not None:
            raise CommandError("an exported program takes no --recipe and no --expert; give the pipeline's folder")
        return {path.stem: _exported(path)}
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise CommandError(f"{path} has no model_index.json; give a whole pipeline's folder, or an exported .pt2")
    return _experts(path, prompt, seed, overrides, recipe, expert)


def _exported(path: Path) -> Capture:
    from ..graph_capture import capture_program
    from .exported import load_program

    return capture_program(load_program(path))


def _experts(
    path: Path, prompt: str, seed: int, overrides: dict[str, Any], recipe: Path | None, expert: str | None
) -> dict[str, Capture]:
    import torch
    from torch import nn

    from ..calibration import experts
    from ..graph_capture import capture
    from ..recipe import Recipe, apply_recipe
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
