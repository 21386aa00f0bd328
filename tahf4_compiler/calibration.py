"""Collect what the activations of a model look like: ``with tahf4.calibrate(pipe) as calibration: ...``.

The model runs through the same compiler, with the pass ``observe`` in place of the rewrite. Statistics are kept for
each distinct activation (q, k and v read one), separately for each expert, part of the denoising schedule and
guidance branch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from .attach import linear_weights
from .errors import CalibrationError, OptionError
from .files import decode, encode, is_plain, load_tensors, save_tensors
from .observing import Handles
from .options import Options
from .packing import checksum
from .sketch import RowSample, Sketch
from .steps import StepCounter

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["Activation", "Calibration", "calibrate", "experts"]

log = logging.getLogger(__name__)

FORMAT = "tahf4-calibration-1"
KEPT_CALLS = 8
Call = tuple[tuple[Any, ...], dict[str, Any]]


def experts(model: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by component name, or a module itself under the name ``""``.

    Args:
        model: an ``nn.Module``, or a diffusers pipeline with ``transformer``, ``transformer_2`` or ``unet``.

    Raises:
        OptionError: neither.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    names = ("transformer", "transformer_2", "transformer_3", "unet")
    found = {name: getattr(model, name, None) for name in names}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise OptionError(
            f"got a {type(model).__name__}; expected an nn.Module, or a diffusers pipeline with a transformer or unet"
        )
    return modules


@dataclass(frozen=True)
class Activation:
    """A tensor that linears read.

    Attributes:
        expert: component name, ``""`` for a module.
        name: module path of the first linear that reads it.
        members: module paths of all of them.
        channels: its last axis.
    """

    expert: str
    name: str
    members: tuple[str, ...]
    channels: int


class _Cells:
    """The statistics of one activation, by step group and branch."""

    def __init__(self, activation: Activation, rows: int) -> None:
        self.activation = activation
        self._rows = rows
        self.cells: dict[tuple[int, str], tuple[Sketch, RowSample]] = {}

    def cell(self, key: tuple[int, str], device: torch.device | str = "cpu") -> tuple[Sketch, RowSample]:
        if key not in self.cells:
            name = f"{self.activation.expert}/{self.activation.name}/{key[0]}/{key[1]}"
            self.cells[key] = Sketch(self.activation.channels, device), RowSample(self._rows, name)
        return self.cells[key]


class Calibration:
    """Statistics of a model's activations, collected between ``__enter__`` and ``__exit__``.

    Attributes:
        models: what is observed, by expert.
        activations: statistics by ``(expert, name)``.
        prompts: those that :meth:`run` has finished, in order.
        calls: a few calls of each expert, with their arguments, for the sensitivity of the network's output.
    """

    def __init__(
        self,
        model: Any,
        *,
        percentile: float = 99.9,
        step_groups: int = 1,
        rows: int = 64,
        checkpoint: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """See :func:`calibrate`."""
        if not isinstance(step_groups, int) or step_groups < 1:
            raise OptionError(f"step_groups is {step_groups!r}; expected an integer of at least 1")
        if not isinstance(rows, int) or rows < 0:
            raise OptionError(f"rows is {rows!r}; expected an integer of at least 0")
        check_percentile(percentile)
        self.models = experts(model)
        self.percentile = float(percentile)
        self.step_groups = step_groups
        self.rows = rows
        self.activations: dict[tuple[str, str], _Cells] = {}
        self.prompts: list[str] = []
        self.calls: dict[str, list[Call]] = {}
        self._calls_seen: dict[tuple[str, int, str], int] = {}
        self._pipe = None if isinstance(model, nn.Module) else model
        self._options = Options.parse(options)
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for expert, module in self.models.items():
            for path, weight in linear_weights(module):
                self._paths[weight] = (expert, path)
        self._branch = ""
        self._step: int | None = None
        self._counter: StepCounter | None = None
        self._stack = contextlib.ExitStack()
        if self._checkpoint is not None and self._checkpoint.exists():
            self._load(self._checkpoint)

    # -- running ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Calibration:
        """Compile the model with observers, in place of how it was compiled before."""
        from .backends.dynamo import compiler
        from .passes import classify, normalize, observe, plan

        passes = [normalize.Normalize(), classify.Classify(), plan.Plan(), observe.Observe()]
        backend = compiler(self._options, passes)
        with contextlib.ExitStack() as stack:
            if self._pipe is not None and hasattr(self._pipe, "scheduler"):
                self._counter = StepCounter.of(self._pipe.scheduler)
            stack.enter_context(Handles(self._observer))
            for expert, module in self.models.items():
                stack.enter_context(_compiled(module, backend, _Calls(self, expert)))
                stack.enter_context(self._branches(module))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the model back as it was; keep what was seen, also after an error."""
        self._stack.close()
        if kind is None and not self.activations:
            raise CalibrationError(
                "the calibration saw no activation: call the model inside the `with` block, under torch.no_grad(), "
                "and check that torch.compile is not switched off (TORCHDYNAMO_DISABLE)"
            )
        if self._checkpoint is not None and self.activations and not self.prompts:
            self.save(self._checkpoint)

    def run(self, prompts: Iterable[str], **arguments: Any) -> None:
        """Call the pipeline once for each prompt, with a progress bar; a prompt that a checkpoint has is skipped.

        After each prompt the checkpoint is written, if there is one, so that a run that is stopped takes up after
        the last finished prompt, with the same statistics as one that was not.

        Args:
            prompts: of distinct texts.
            arguments: of the pipeline's call. Prompt ``i`` starts from the noise of seed ``i`` unless there is a
                ``generator``.

        Raises:
            CalibrationError: a module is calibrated, not a pipeline.
        """
        if self._pipe is None:
            raise CalibrationError("run(prompts) needs a pipeline; call a module yourself inside the `with` block")
        todo = list(prompts)
        with tqdm(total=len(todo), desc="calibration", unit="prompt") as bar:
            for i, prompt in enumerate(todo):
                if prompt not in self.prompts:
                    before = dict(arguments)
                    before.setdefault("generator", torch.Generator().manual_seed(i))
                    with torch.no_grad():
                        self._pipe(prompt, **before)
                    self.prompts.append(prompt)
                    if self._checkpoint is not None:
                        self.save(self._checkpoint)
                bar.update()

    @contextlib.contextmanager
    def at(self, *, step_group: int | None = None, branch: str | None = None) -> Iterator[None]:
        """Say where calls of a bare module belong; a pipeline's calls say so themselves.

        Args:
            step_group: below ``step_groups``.
            branch: any name, such as ``"cond"`` and ``"uncond"``.

        Raises:
            OptionError: there is no such step group.
        """
        if step_group is not None and not 0 <= step_group < self.step_groups:
            raise OptionError(f"step_group is {step_group}; expected 0 to {self.step_groups - 1}")
        old = self._step, self._branch
        self._step = step_group if step_group is not None else self._step
        self._branch = branch if branch is not None else self._branch
        try:
            yield
        finally:
            self._step, self._branch = old

    @contextlib.contextmanager
    def _branches(self, module: nn.Module) -> Iterator[None]:
        """Listen to ``cache_context``, by which diffusers' pipelines name the guidance branch of a call."""
        inner = getattr(module, "cache_context", None)
        if inner is None:
            yield
            return

        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.at(branch=name), inner(name, *args, **kwargs) as value:
                yield value

        module.__dict__["cache_context"] = cache_context
        try:
            yield
        finally:
            module.__dict__.pop("cache_context", None)

    def _where(self) -> tuple[int, str]:
        if self._step is not None:
            return self._step, self._branch
        return (self._counter.group(self.step_groups) if self._counter is not None else 0), self._branch

    def _observer(self, weights: tuple[Tensor, ...]) -> Callable[[Tensor], None] | None:
        known = [self._paths.get(weight) for weight in weights]
        found = [entry for entry in known if entry is not None]
        if not found:
            return None
        expert = found[0][0]
        members = tuple(path for _, path in found)
        activation = Activation(expert, members[0], members, weights[0].shape[1])
        old = self.activations.get((expert, members[0]))
        if old is not None and len(old.activation.members) < len(members):
            old.activation = activation
        cells = self.activations.setdefault((expert, members[0]), _Cells(activation, self.rows))

        def observe(x: Tensor) -> None:
            sketch, sample = cells.cell(self._where(), x.device)
            sketch.update(x)
            if self.rows:
                sample.update(x)

        return observe

    # -- results ---------------------------------------------------------------------------------------------------

    def sketch(
        self, name: str, *, expert: str | None = None, step_group: int | None = None, branch: str | None = None
    ) -> Sketch:
        """Return the merged statistics of an activation.

        Args:
            name: module path of a linear that reads it.
            expert: component name; by default the first that has it.
            step_group: one of them, or None for all.
            branch: one of them, or None for all.

        Raises:
            CalibrationError: nothing was seen there.
        """
        for (owner, _), cells in self.activations.items():
            if name in cells.activation.members and expert in (None, owner):
                chosen = [
                    sketch
                    for (group, side), (sketch, _) in cells.cells.items()
                    if step_group in (None, group) and branch in (None, side)
                ]
                if chosen:
                    return merged(chosen)
        seen = ", ".join(sorted(name for _, name in self.activations)[:3])
        raise CalibrationError(f"nothing was seen of the activation of {name!r} there; there are {seen}, ...")

    def merge(self, other: Calibration) -> None:
        """Add what another calibration of the same model saw, for example in another process.

        Raises:
            CalibrationError: the step groups differ.
        """
        if other.step_groups != self.step_groups:
            raise CalibrationError(f"step_groups are {self.step_groups} and {other.step_groups}; expected one number")
        for key, theirs in other.activations.items():
            mine = self.activations.setdefault(key, _Cells(theirs.activation, self.rows))
            for where, (sketch, sample) in theirs.cells.items():
                own_sketch, own_sample = mine.cell(where, sketch.counts.device)
                own_sketch.merge(sketch)
                own_sample.merge(sample)
        for place, count in other._calls_seen.items():
            self._calls_seen[place] = self._calls_seen.get(place, 0) + count
        for expert, calls in other.calls.items():
            kept = self.calls.setdefault(expert, [])
            kept += calls[: KEPT_CALLS - len(kept)]
        self.prompts += [prompt for prompt in other.prompts if prompt not in self.prompts]

    def recipe(self, **choices: Any) -> Recipe:
        """Turn the statistics into a recipe: see :func:`tahf4_compiler.recipe_making.make_recipe`."""
        from .recipe_making import make_recipe

        return make_recipe(self, **choices)

    def weights(self, expert: str, paths: Sequence[str]) -> list[Tensor]:
        """Return the weights at some module paths of an expert."""
        found = dict(linear_weights(self.models[expert]))
        return [found[path] for path in paths]

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything seen so far to a safetensors file, beside it and renamed."""
        tensors: dict[str, Tensor] = {}
        index: list[dict[str, Any]] = []
        for i, ((expert, name), cells) in enumerate(sorted(self.activations.items())):
            index.append({"expert": expert, "name": name, "members": list(cells.activation.members), "cells": []})
            for j, ((group, branch), (sketch, sample)) in enumerate(sorted(cells.cells.items())):
                index[-1]["cells"].append([group, branch])
                for key, value in {**sketch.tensors(), **sample.tensors()}.items():
                    tensors[f"{i}.{j}.{key}"] = value
        calls = {
            expert: [encode(call, tensors, f"call.{expert}.{i}") for i, call in enumerate(kept)]
            for expert, kept in self.calls.items()
        }
        header = {
            "calls": calls,
            "calls_seen": sorted([*where, count] for where, count in self._calls_seen.items()),
            "step_groups": self.step_groups,
            "rows": self.rows,
            "prompts": self.prompts,
            "weights": self._weight_sums(),
            "activations": index,
        }
        save_tensors(Path(path), tensors, FORMAT, header)

    def load(self, path: str | Path) -> None:
        """Add what a file holds that :meth:`save` wrote.

        Raises:
            CalibrationError: the file is no such file, or of other weights or step groups.
        """
        other = Calibration.__new__(Calibration)
        other.__dict__.update(self.__dict__)
        other.activations, other.prompts, other.calls, other._calls_seen = {}, [], {}, {}
        other._load(Path(path))
        self.merge(other)

    def _load(self, path: Path) -> None:
        tensors, header = load_tensors(path, FORMAT, CalibrationError)
        for what, mine in (("step_groups", self.step_groups), ("rows", self.rows)):
            if header[what] != mine:
                raise CalibrationError(
                    f"{path} was made with {what}={header[what]}, this calibration has {mine}; use the same, or "
                    "another file"
                )
        if header["weights"] != self._weight_sums():
            raise CalibrationError(f"{path} was made with other weights; use another checkpoint file")
        for i, entry in enumerate(header["activations"]):
            first = tensors[f"{i}.0.counts"]
            activation = Activation(entry["expert"], entry["name"], tuple(entry["members"]), len(first))
            cells = self.activations[(entry["expert"], entry["name"])] = _Cells(activation, self.rows)
            for j, (group, branch) in enumerate(entry["cells"]):
                prefix = f"{i}.{j}."
                part = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
                sample = cells.cell((group, branch))[1]
                sample.load(part)
                cells.cells[(group, branch)] = Sketch.from_tensors(part), sample
        self.prompts = list(header["prompts"])
        self._calls_seen = {(expert, group, side): n for expert, group, side, n in header["calls_seen"]}
        device = {expert: next(model.parameters()).device for expert, model in self.models.items()}
        for expert, kept in header["calls"].items():
            self.calls[expert] = [decode(call, tensors, device[expert]) for call in kept]

    def _weight_sums(self) -> dict[str, int]:
        return {f"{expert}/{path}": int(checksum(w)) for (expert, path), w in self._all_weights()}

    def _all_weights(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        for expert, module in self.models.items():
            for path, weight in linear_weights(module):
                yield (expert, path), weight


def calibrate(
    model: Any,
    *,
    percentile: float = 99.9,
    step_groups: int = 1,
    rows: int = 64,
    checkpoint: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Calibration:
    """Observe a model's activations: ``with tahf4.calibrate(pipe) as calibration: pipe(prompt)``.

    Inside the block the model's denoisers are compiled with observers; afterwards they are as they were before.

    Args:
        model: a diffusers pipeline, or any ``nn.Module``.
        percentile: of |x|, the default of :meth:`Calibration.recipe`; any other can be asked for afterwards.
        step_groups: equal parts of the denoising schedule that are kept apart.
        rows: sample rows kept for each activation, step group and branch, for searches and sensitivity.
        checkpoint: file that :meth:`Calibration.run` writes after each prompt, and takes up if it exists.
        options: of the backend, such as ``{"inductor": False}``.

    Memory: for each distinct activation, step group and branch ``channels * (404 + rows * bytes of a value)``
    bytes. Wan2.2 A14B has 1,781,760 observed channels an expert: 0.72 GB and, with 64 rows in bfloat16,
    0.23 GB for each expert, step group and branch.

    Raises:
        OptionError: an argument is of the wrong type or range.
        CalibrationError: the checkpoint does not fit.
    """
    return Calibration(
        model, percentile=percentile, step_groups=step_groups, rows=rows, checkpoint=checkpoint, options=options
    )


def check_percentile(value: Any) -> None:
    """Raise :class:`OptionError` unless a value is a percentile."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 100:
        raise OptionError(f"percentile is {value!r}; expected a number above 0 and up to 100 (100 is the maximum)")


def merged(sketches: Sequence[Sketch]) -> Sketch:
    whole = Sketch(len(sketches[0].maxima), sketches[0].maxima.device)
    for sketch in sketches:
        whole.merge(sketch)
    return whole


class _Calls:
    """Keeps the arguments of a few of an expert's calls, one of each step group and branch before a second one."""

    def __init__(self, calibration: Calibration, expert: str) -> None:
        self._calibration, self._expert = calibration, expert

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen, where = self._calibration._calls_seen, (self._expert, *self._calibration._where())
        count = seen[where] = seen.get(where, 0) + 1
        kept = self._calibration.calls.setdefault(self._expert, [])
        # The first call of each place, then every fifth: neighbouring steps tell the same.
        if len(kept) < KEPT_CALLS and count % 5 == 1 and is_plain((args, kwargs)):
            kept.append(torch.utils._pytree.tree_map(_copy, (args, kwargs)))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _compiled(module: nn.Module, backend: Any, listen: _Calls) -> Iterator[None]:
    """Compile a module whole, show its calls to a listener, and put it back as it was."""
    old = {m: m._compiled_call_impl for m in module.modules() if m._compiled_call_impl is not None}
    for part in old:
        part._compiled_call_impl = None
    module.compile(backend=backend)
    call: Any = module._compiled_call_impl

    def heard(*args: Any, **kwargs: Any) -> Any:
        listen(args, kwargs)
        return call(*args, **kwargs)

    module._compiled_call_impl = heard
    try:
        yield
    finally:
        module._compiled_call_impl = None
        for part, compiled in old.items():
            part._compiled_call_impl = compiled
