"""What can be inspected: a folder of diffusers, an exported program, a dump."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...graph_capture.captured import Capture
from ...graph_capture.export import capture, from_program
from ...lowering import Lowered, lower
from ...model.components import EXPERTS
from ...packed.steps import attach_steps
from ...recipe.apply import apply_recipe
from ...recipe.recipe import Recipe
from ..errors import CommandError
from ..exported import load_program
from .examples import example_arguments, parse_shape
from .report import Report, read_dump
from .statistics import Evidence

__all__ = ["Request", "loaded", "recipe_part", "reports"]


@dataclass(frozen=True)
class Request:
    """What to inspect, and how.

    Attributes:
        model: folder or file.
        recipe: file, or None.
        calibration: file, or None.
        shape: of the latent, as text.
        dtype: of the weights of a folder; None for bfloat16.
        weights: load them, so that the model can run.
        options: of the backend.
    """

    model: Path
    recipe: Path | None = None
    calibration: Path | None = None
    shape: str | None = None
    dtype: torch.dtype | None = None
    weights: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def reports(request: Request) -> Iterator[tuple[Report, Lowered | None, Mapping[str, Any]]]:
    """Yield a report for each graph, with the lowered model and the arguments to run it with.

    A dump has no model to run: None.

    Raises:
        CommandError: the path is nothing that can be inspected, or an option does not fit it.
    """
    path = request.model
    recipe = Recipe.load(request.recipe) if request.recipe is not None else None
    calibration = request.calibration
    if calibration is None and request.recipe is not None:
        beside = request.recipe.with_name(f"{request.recipe.name}.calibration")
        calibration = beside if beside.is_file() else None
    parse_shape(request.shape)
    if path.suffix == ".pt2" and path.is_file():
        yield _exported(path, recipe, calibration, request)
        return
    if not path.is_dir():
        raise CommandError(f"there is no folder or .pt2 file {path}; {_EXPECTED}")
    dumps = sorted([*path.glob("graph_*/plan.json"), *path.glob("plan.json")])
    if dumps:
        _refuse(request, f"{path} is a dump: what it shows was compiled already")
        for plan in dumps:
            report = read_dump(plan.parent)
            yield report.with_evidence(Evidence.of(recipe, calibration)), None, {}
        return
    for name, folder in _components(path):
        yield _component(name, folder, recipe, calibration, request)


def _refuse(request: Request, why: str) -> None:
    """Refuse the options that decide how a model is compiled."""
    settings = set(request.options)
    given = {
        "--shape": request.shape is not None,
        "--dtype": request.dtype is not None,
        "--keep": "keep" in settings,
        "--set": bool(settings - {"keep"}),
    }
    if names := [name for name, is_given in given.items() if is_given]:
        verb = "does" if len(names) == 1 else "do"
        raise CommandError(
            f"{', '.join(names)} {verb} not apply: {why}. Leave that out, or give the model's folder or .pt2 file."
        )


_EXPECTED = "expected a folder of a diffusers model or pipeline, a dump (dump_dir), or a program of torch.export"


def _components(path: Path) -> list[tuple[str, Path]]:
    if (path / "model_index.json").is_file():
        index = _json(path / "model_index.json")
        found = [(name, path / name) for name in EXPERTS if name in index and (path / name / "config.json").is_file()]
        if not found:
            raise CommandError(f"the pipeline {path} has none of {', '.join(EXPERTS)} with a config.json")
        return found
    if (path / "config.json").is_file():
        return [("", path)]
    raise CommandError(f"{path} holds no model_index.json, config.json or plan.json; {_EXPECTED}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CommandError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CommandError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage rarely: imports and tracing make many objects that stay, and each collection looks at them."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collections()
def _component(
    name: str, folder: Path, recipe: Recipe | None, calibration: Path | None, request: Request
) -> tuple[Report, Lowered, Mapping[str, Any]]:
    dtype = request.dtype or torch.bfloat16
    if request.weights:
        model, arguments = loaded(folder, dtype, request.shape)
    else:
        config = _json(folder / "config.json")
        model, scope = _structure(_class(config, folder), config, folder, dtype)
        with scope, torch.device("cpu"):
            arguments = example_arguments(model, parse_shape(request.shape), dtype)
    cls = type(model)
    expert = recipe_part(name, folder, recipe)
    if recipe is not None and (expert is not None or not name):
        # Which steps run in high precision is no property of the graph.
        part = dataclasses.replace(recipe, high_precision_steps=())
        apply_recipe(model, part, expert=expert, check_weights=request.weights)
        evidence = Evidence.of(recipe, calibration, expert)
    else:
        evidence = Evidence.of(None, calibration, name)
    lowered = lower(capture(model, (), arguments), options=request.options)
    title = f"{name} ({cls.__name__})" if name else cls.__name__
    return Report.of(lowered, evidence, title=title, source=str(folder)), lowered, arguments


def loaded(folder: Path, dtype: torch.dtype, shape: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model of diffusers on the GPU, if there is one, with example arguments of random numbers.

    Args:
        folder: with ``config.json`` and weights.
        dtype: of the weights.
        shape: as :func:`parse_shape` takes it.

    Raises:
        CommandError: it does not load, or no arguments are known for its class.
    """
    model = _loaded(_class(_json(folder / "config.json"), folder), folder, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return model.to(device), example_arguments(model, parse_shape(shape), dtype)


def recipe_part(name: str, folder: Path, recipe: Recipe | None) -> str | None:
    """Return which part of a recipe belongs to a component of a pipeline, or to a folder of one model; or None."""
    experts = list(recipe.experts) if recipe is not None else []
    if name:
        return name if name in experts else None
    if folder.resolve().name in experts:
        return folder.resolve().name
    return experts[0] if len(experts) == 1 else None


def _class(config: Mapping[str, Any], folder: Path) -> Any:
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise CommandError(f"{folder / 'config.json'} names the class {name!r}, which is no model of diffusers")
    return cls


def _structure(cls: Any, config: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a model whose tensors have shapes and dtypes but no memory, and the mode that they belong to.

    They say that they are on the CPU, unlike those of the meta device, so that it is known which kernels would run.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    keep = cls._keep_in_fp32_modules or []
    try:
        with mode, torch.device("cpu"):
            model = cls.from_config({k: v for k, v in config.items() if k != "quantization_config"}).eval()
            for path, owner in model.named_modules():
                for name, value in owner._parameters.items():
                    full = f"{path}.{name}".split(".")
                    if value is not None and value.is_floating_point() and not any(part in full for part in keep):
                        owner._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
    except Exception as error:  # of the class, for whatever a configuration can hold
        raise CommandError(f"{cls.__name__} refuses the configuration in {folder}: {error}") from error
    return model, mode


def _loaded(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    try:
        model: nn.Module = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    except Exception as error:  # of many libraries, for whatever a folder can hold
        raise CommandError(f"{folder} does not load as a {cls.__name__}: {error}") from error
    attach_steps(model, None)  # of a packed folder; no property of the graph either
    return model.eval()


def _exported(
    path: Path, recipe: Recipe | None, calibration: Path | None, request: Request
) -> tuple[Report, Lowered, Mapping[str, Any]]:
    if request.shape is not None:
        raise CommandError("--shape does not apply to an exported program: its shapes are in the file")
    if request.dtype is not None:
        raise CommandError("--dtype does not apply to an exported program: its weights are in the file")
    program = load_program(path)
    args, kwargs = program.example_inputs
    model = program.module()
    if recipe is not None:
        apply_recipe(model, dataclasses.replace(recipe, high_precision_steps=()))
    captured: Capture = from_program(program, model, args, kwargs)
    captured.name = path.stem
    lowered = lower(captured, options=request.options)
    report = Report.of(lowered, Evidence.of(recipe, calibration), source=str(path))
    return report, lowered, {"*": args, **kwargs}
