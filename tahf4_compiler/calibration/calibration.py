"""Collect what the activations of a model look like: ``with tahf4.calibrate(pipe) as calibration: ...``.

The model runs through the same compiler, with the pass ``observe`` in place of the rewrite. Statistics are kept for
each distinct activation (q, k and v read one), separately for each expert, part of the denoising schedule and
guidance branch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from ..errors import CalibrationError, OptionError
from ..files.memo import Measured
from ..files.tensors import digest, load_tensors, save_tensors
from ..model.linears import linear_weights
from ..model.parts import running_weights, whole
from ..model.steps import StepCounter
from ..ops.observers import Handles
from ..options import Options
from ..packed.linear import HiF4Linear
from ..weights.checksum import checksum
from .calls import Call, KeptCalls, Place
from .listening import Listener, observed, observing_backend
from .sketch import Sketch

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe
from ..model.components import experts
from .statistics import Activation, _Cells, check_percentile, merged

__all__ = ["Calibration", "calibrate"]

log = logging.getLogger(__name__)

FORMAT = "tahf4-calibration-3"


class Calibration:
    """Statistics of a model's activations, collected between ``__enter__`` and ``__exit__``.

    Attributes:
        models: what is observed, by expert.
        activations: statistics by ``(expert, name)``.
        prompts: those that :meth:`run` has finished, in order.
        kept: a few calls of each expert, with their arguments, for the error of the network's output.
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
        sequence_group: Any = None,
    ) -> None:
        """See :func:`calibrate`."""
        if not isinstance(step_groups, int) or step_groups < 1:
            raise OptionError(f"step_groups is {step_groups!r}; expected an integer of at least 1")
        if not isinstance(rows, int) or rows < 0:
            raise OptionError(f"rows is {rows!r}; expected an integer of at least 0")
        check_percentile(percentile)
        self.models = experts(model)
        for expert, module in self.models.items():
            if any(isinstance(part, HiF4Linear) for part in module.modules()):
                raise CalibrationError(
                    f"{expert or type(module).__name__} is packed: calibrate the original model, and give the recipe "
                    "to tahf4.quantize_"
                )
        self.percentile = float(percentile)
        self.step_groups = step_groups
        self.rows = rows
        self.activations: dict[tuple[str, str], _Cells] = {}
        self.prompts: list[str] = []
        self.kept = KeptCalls()
        self._candidates: list[tuple[str, Place, Call | None]] | None = None  # of one prompt, while prompts are divided
        self._merged: list[str] = []
        self._part = _rank(sequence_group)
        self._pipe = None if isinstance(model, nn.Module) else model
        self.options = Options.parse(options)
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for expert, module in self.models.items():
            for path, weight in running_weights(module):
                self._paths[weight] = (expert, path)
        self._branch = ""
        self._source = ""
        self._step: int | None = None
        self._running = False
        self._own_calls = False
        self._observed = 0
        self._arguments: str | None = None
        self._taken_up: list[str] = []
        self._stack = contextlib.ExitStack()
        if self._checkpoint is not None and self._checkpoint.exists():
            self._load(self._checkpoint)
            self._taken_up = list(self.prompts)

    # -- running ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Calibration:
        """Compile the model with observers, in place of how it was compiled before."""
        backend = observing_backend(self.options)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._counted_scheduler())
            stack.enter_context(Handles(self._observer))
            for expert, module in self.models.items():
                stack.enter_context(observed(module, backend, Listener(self, expert)))
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
        # What a prompt that was not finished left is not kept: run() does the prompt again.
        if self._checkpoint is not None and self._own_calls and not self._running:
            self.save(self._checkpoint)

    def run(self, prompts: Iterable[str], *, group: Any = None, **arguments: Any) -> None:
        """Call the pipeline once for each prompt, with a progress bar; a prompt that a checkpoint has is skipped.

        After each prompt the checkpoint is written, if there is one, so that a run that is stopped takes up after
        the last finished prompt, with the same statistics as one that was not.

        Args:
            prompts: of distinct texts.
            group: a process group whose processes divide the prompts, each with a whole pipeline of its own; all are
                given all the prompts. In the end each has what one process would have.
            arguments: of the pipeline's call. Prompt ``i`` starts from the noise of seed ``i`` unless there is a
                ``generator``.

        Raises:
            CalibrationError: a module is calibrated, not a pipeline; or the checkpoint was made with other prompts
                or arguments.
        """
        if self._pipe is None:
            raise CalibrationError("run(prompts) needs a pipeline; call a module yourself inside the `with` block")
        todo = list(prompts)
        if group is not None:
            from .ranks import run_divided

            run_divided(self, todo, group, arguments)
            return
        self._check_taken_up(todo, arguments)
        with tqdm(total=len(todo), desc="calibration", unit="prompt") as bar:
            for i, prompt in enumerate(todo):
                if prompt not in self.prompts:
                    self._run_prompt(i, prompt, arguments)
                    if self._checkpoint is not None:
                        self.save(self._checkpoint)
                bar.update()

    def _run_prompt(self, i: int, prompt: str, arguments: Mapping[str, Any]) -> None:
        """Call the pipeline for the prompt of a number."""
        before = dict(arguments)
        before.setdefault("generator", torch.Generator().manual_seed(i))
        self._running = True  # and stays so after an error: half a prompt was seen
        with torch.no_grad(), self.at(source=prompt):
            self._pipe(prompt, **before)  # type: ignore[misc]
        self._running = False
        self.prompts.append(prompt)

    def _check_taken_up(self, todo: Sequence[str], arguments: Mapping[str, Any]) -> None:
        """Refuse to add to a checkpoint of another run."""
        plain = {name: value for name, value in arguments.items() if not callable(value)}
        words = {name: "a generator" if isinstance(v, torch.Generator) else repr(v) for name, v in plain.items()}
        text = ", ".join(f"{name}={words[name]}" for name in sorted(words))
        others = [prompt for prompt in self._taken_up if prompt not in todo]
        if others:
            raise CalibrationError(
                f"the checkpoint {self._checkpoint} has seen {len(others)} prompts that are not in this run, such as "
                f"{others[0]!r}; name another checkpoint, or delete this one"
            )
        if self._taken_up and self._arguments not in (None, text):
            raise CalibrationError(
                f"the checkpoint {self._checkpoint} was made with {self._arguments or 'no arguments'}; this run has "
                f"{text or 'none'}. Use the same, name another checkpoint, or delete this one"
            )
        self._arguments = text

    @contextlib.contextmanager
    def _counted_scheduler(self) -> Iterator[None]:
        """Count the steps of the pipeline's scheduler, and leave it as it was."""
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is None or StepCounter.counts(scheduler):
            yield
            return
        StepCounter.of(scheduler)
        try:
            yield
        finally:
            StepCounter.forget(scheduler)

    @contextlib.contextmanager
    def at(
        self, *, step_group: int | None = None, branch: str | None = None, source: str | None = None
    ) -> Iterator[None]:
        """Say where calls of a bare module belong; a pipeline's calls say so themselves.

        Args:
            step_group: below ``step_groups``.
            branch: any name, such as ``"cond"`` and ``"uncond"``.
            source: any name of the input, such as a prompt or the number of a batch. Processes that divide the inputs
                name them, so that :meth:`all_reduce` gives the sample rows that one process has.

        Raises:
            OptionError: there is no such step group.
        """
        if step_group is not None and not 0 <= step_group < self.step_groups:
            raise OptionError(f"step_group is {step_group}; expected 0 to {self.step_groups - 1}")
        old = self._step, self._branch, self._source
        self._step = step_group if step_group is not None else self._step
        self._branch = branch if branch is not None else self._branch
        self._source = source if source is not None else self._source
        try:
            yield
        finally:
            self._step, self._branch, self._source = old

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

    def _counter(self) -> StepCounter | None:
        scheduler = getattr(self._pipe, "scheduler", None)
        return StepCounter.of(scheduler) if scheduler is not None else None

    def _where(self) -> tuple[int, str]:
        if self._step is not None:
            return self._step, self._branch
        counter = self._counter()
        return (counter.group(self.step_groups) if counter is not None else 0), self._branch

    def _place(self) -> Place:
        if self._step is not None:
            return Place(self._source, self._branch, self._step, self.step_groups)
        counter = self._counter()
        if counter is None:
            return Place(self._source, self._branch)
        return Place(self._source, self._branch, min(counter.step, counter.steps - 1), counter.steps)

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
        cells = self.activations.setdefault((expert, members[0]), _Cells(activation, self.rows, self.step_groups))

        def observe(x: Tensor) -> None:
            self._observed += 1
            sketch, sample = cells.cell(self._where(), x.device)
            sketch.update(x)
            if self.rows:
                sample.update(x, self._source, self._part * x.shape[-2] if x.dim() > 1 else 0)

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
            CalibrationError: the step groups differ, the model is another, or both saw one prompt. Nothing is
                added then.
        """
        if other.step_groups != self.step_groups:
            raise CalibrationError(f"step_groups are {self.step_groups} and {other.step_groups}; expected one number")
        if other is self:
            raise CalibrationError("a calibration cannot be merged with itself: everything would count twice")
        twice = [prompt for prompt in other.prompts if prompt in self.prompts]
        if twice:
            raise CalibrationError(
                f"both calibrations saw {twice[0]!r} ({len(twice)} prompts in all), which would count twice; merge "
                "statistics of different prompts"
            )
        for key, theirs in other.activations.items():
            known = self.activations.get(key)
            fits = key[0] in self.models and (known is None or known.activation.channels == theirs.activation.channels)
            if not fits or not set(theirs.activation.members) <= self._known_paths(key[0]):
                raise CalibrationError(
                    f"the other calibration is of another model: it saw {'/'.join(filter(None, key))} with "
                    f"{theirs.activation.channels} channels, which this model does not have"
                )
        for key, theirs in other.activations.items():
            mine = self.activations.setdefault(key, _Cells(theirs.activation, self.rows, self.step_groups))
            for where, (sketch, sample) in theirs.cells.items():
                own_sketch, own_sample = mine.cell(where, sketch.counts.device)
                own_sketch.merge(sketch)
                own_sample.merge(sample)
        self.kept.count(other.kept.counted())
        for expert, calls in other.kept.calls.items():
            self.kept.extend(expert, zip(other.kept.places[expert], calls, strict=True))
        self.prompts += [prompt for prompt in other.prompts if prompt not in self.prompts]

    def all_reduce(self, group: Any = None, *, over: str = "inputs") -> None:
        """Give every process of a group what all of them saw; each must call this, after its ``with`` block.

        Where processes saw different inputs (``over="inputs"``, data parallelism) everything adds up.
        :meth:`run` with a group does this itself; with a module, name each input by :meth:`at` (``source=``).
        Where they held parts of each sequence (``over="sequence"``, context parallelism; ``calibrate`` was told the
        ``sequence_group``) an activation that all saw whole, such as the text's, counts once. Where they held parts of
        each weight (``over="channels"``, :func:`tahf4_compiler.distributed.tensor_parallel`) the channels that
        row-parallel linears read are joined.

        The result does not depend on the order of ranks. Counts, maxima and sample rows are those of one process;
        sums of squares differ from it by rounding in float64.

        Args:
            group: a process group, the default one if None.
            over: what the processes divided.

        Raises:
            CalibrationError: there is no process group; the ranks calibrated different models or with different
                settings, or one prompt twice; or this was done before. Every rank raises it; nothing is changed then.
            OptionError: ``over`` is unknown.
        """
        from .ranks import all_reduce

        all_reduce(self, group, over=over)

    def measured(self) -> Measured:
        """Return where numbers are kept that take long to measure: beside the checkpoint, if there is one.

        Several processes measure together and must not differ in what they know: then nothing is kept.
        """
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        path = self._checkpoint
        return Measured(path.with_name(f"{path.name}.measured") if path and not together else None, self._identity)

    def _identity(self) -> str:
        """Return a digest of what was seen, of the calls that were kept, and of all that the models hold."""
        tensors: dict[str, Tensor] = {}
        header = {
            "tahf4": importlib.metadata.version("tahf4-compiler"),
            "torch": torch.__version__,
            "calls": self.kept.header(tensors),
            "tensors": {
                f"{expert}/{name}": int(checksum(value))
                for expert, module in self.models.items()
                for name, value in [*module.named_parameters(), *module.named_buffers()]
            },
            "percentile": self.percentile,
        }
        for i, (_, cells) in enumerate(sorted(self.activations.items())):
            for j, (_, (sketch, sample)) in enumerate(sorted(cells.cells.items())):
                parts = {"maxima": sketch.maxima, "squares": sketch.squares, "priorities": sample.priorities}
                tensors |= {f"{i}.{j}.{name}": part.detach().cpu() for name, part in parts.items()}
        return digest(header, {name: tensor.detach().cpu() for name, tensor in tensors.items()})

    def _known_paths(self, expert: str) -> set[str]:
        return {path for path, _ in linear_weights(self.models[expert])}

    def recipe(self, **choices: Any) -> Recipe:
        """Turn the statistics into a recipe: see :func:`tahf4_compiler.calibration.making.make_recipe`."""
        from .making import make_recipe

        return make_recipe(self, **choices)

    def weights(self, expert: str, paths: Sequence[str]) -> list[Tensor]:
        """Return the weights at some module paths of an expert, whole."""
        found = dict(linear_weights(self.models[expert]))
        return [whole(found[path]) for path in paths]

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
        header = {
            "calls": self.kept.header(tensors),
            "step_groups": self.step_groups,
            "rows": self.rows,
            "prompts": self.prompts,
            "arguments": self._arguments,
            "weights": self._weight_sums(),
            "activations": index,
        }
        save_tensors(Path(path), tensors, FORMAT, header, CalibrationError)

    def load(self, path: str | Path) -> None:
        """Add what a file holds that :meth:`save` wrote.

        Raises:
            CalibrationError: the file is no such file, or of other weights or step groups.
        """
        other = Calibration.__new__(Calibration)
        other.__dict__.update(self.__dict__)
        other.activations, other.prompts, other.kept = {}, [], KeptCalls()
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
            cells = self.activations[(entry["expert"], entry["name"])] = _Cells(activation, self.rows, self.step_groups)
            for j, (group, branch) in enumerate(entry["cells"]):
                prefix = f"{i}.{j}."
                part = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
                sample = cells.cell((group, branch))[1]
                sample.load(part)
                cells.cells[(group, branch)] = Sketch.from_tensors(part), sample
        self.prompts = list(header["prompts"])
        self._arguments = header["arguments"]
        devices = {expert: next(model.parameters()).device for expert, model in self.models.items()}
        self.kept.load(header["calls"], tensors, devices)

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
    sequence_group: Any = None,
) -> Calibration:
    """Observe a model's activations: ``with tahf4.calibrate(pipe) as calibration: pipe(prompt)``.

    Inside the block the model's denoisers are compiled with observers; afterwards they are as they were before.

    Args:
        model: a diffusers pipeline, or any ``nn.Module``.
        percentile: of ``|x|``, the default of :meth:`Calibration.recipe`; any other can be asked for afterwards.
        step_groups: equal parts of the denoising schedule that are kept apart.
        rows: sample rows kept for each activation, step group and branch, for searches and sensitivity.
        checkpoint: file that :meth:`Calibration.run` writes after each prompt, and takes up if it exists.
        options: of the backend, such as ``{"inductor": False}``.
        sequence_group: the process group among whose ranks a model divides its sequence, in equal parts by rank
            (context parallelism); :meth:`Calibration.all_reduce` puts them together.

    Memory: for each distinct activation, step group and branch ``channels * (404 + rows * bytes of a value)``
    bytes. Wan2.2 A14B has 1,781,760 observed channels an expert: 0.72 GB and, with 64 rows in bfloat16,
    0.23 GB for each expert, step group and branch.

    Raises:
        OptionError: an argument is of the wrong type or range.
        CalibrationError: the checkpoint does not fit.
    """
    return Calibration(
        model, percentile=percentile, step_groups=step_groups, rows=rows, checkpoint=checkpoint, options=options,
        sequence_group=sequence_group,
    )  # fmt: skip


def _rank(group: Any) -> int:
    return torch.distributed.get_rank(group) if group is not None else 0
