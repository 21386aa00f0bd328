"""Collect what the activations of a model look like: ``with tahf4.calibrate(pipe) as calibration: ...``.

The model runs through the same compiler, with the pass ``observe`` in place of the rewrite. Statistics are kept for
each distinct activation (q, k and v read one), separately for each expert, part of the denoising schedule and
guidance branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..model.components import experts
from ..model.parts import running_weights
from ..ops.observers import Handles
from ..options import Options
from ..packed.linear import HiF4Linear
from ..recipe.recipe import Recipe
from . import saved
from .choices import check_options
from .listening import Listener, observed
from .making import make_recipe
from .moments import WIDEST, Moments
from .padding import kept_tokens
from .ranks import all_reduce, run_divided
from .schedule import Schedule
from .seen import Seen
from .statistics import Activation, Cells

__all__ = ["Calibration", "calibrate"]


class Calibration(Seen):
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
        moments: int = WIDEST,
        checkpoint: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        sequence_group: Any = None,
    ) -> None:
        """See :func:`calibrate`."""
        parsed = Options.parse(options)
        check_options(parsed)
        super().__init__(
            experts(model),
            percentile=percentile,
            step_groups=step_groups,
            rows=rows,
            moments=moments,
            options=parsed,
            checkpoint=Path(checkpoint) if checkpoint is not None else None,
        )
        for expert, module in self.models.items():
            if any(isinstance(part, HiF4Linear) for part in module.modules()):
                raise CalibrationError(
                    f"{expert or type(module).__name__} is packed: calibrate the original model, and give the recipe "
                    "to tahf4.quantize_"
                )
        self._part = torch.distributed.get_rank(sequence_group) if sequence_group is not None else 0
        self._whole = sequence_group is None
        self._pipe = None if isinstance(model, nn.Module) else model
        self._schedule = Schedule(self._pipe, step_groups)
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for expert, module in self.models.items():
            for path, weight in running_weights(module):
                self._paths.setdefault(weight, (expert, path))  # of several names the first
        self._listeners: list[Listener] = []
        self._heard = 0  # calls inside of run()
        self._running = False
        self._taken_up: list[str] = []
        self._stack = contextlib.ExitStack()
        if self.checkpoint is not None and self.checkpoint.exists():
            self._take_over(saved.read(self.checkpoint, self))
            self._taken_up = list(self.prompts)

    # -- running ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Calibration:
        """Compile the model with observers, in place of how it was compiled before."""
        self._listeners = [Listener(self, self._schedule, expert) for expert in self.models]
        self._heard = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._schedule.counted())
            stack.enter_context(Handles(self._observer))
            for listener, module in zip(self._listeners, self.models.values(), strict=True):
                stack.enter_context(observed(module, self.options, listener))
                stack.enter_context(self._schedule.branches(module))
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
        if self.checkpoint is not None and self._calls() > self._heard and not self._running:
            self.save(self.checkpoint)

    def _calls(self) -> int:
        return sum(listener.calls for listener in self._listeners)

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
            run_divided(self, todo, group, lambda i, prompt: self._run_prompt(i, prompt, arguments))
            return
        self._check_taken_up(todo, arguments)
        with tqdm(total=len(todo), desc="calibration", unit="prompt") as bar:
            for i, prompt in enumerate(todo):
                if prompt not in self.prompts:
                    self._run_prompt(i, prompt, arguments)
                    if self.checkpoint is not None:
                        self.save(self.checkpoint)
                bar.update()

    def _run_prompt(self, i: int, prompt: str, arguments: Mapping[str, Any]) -> None:
        """Call the pipeline for the prompt of a number."""
        before = dict(arguments)
        before.setdefault("generator", torch.Generator("cpu").manual_seed(i))
        self._running = True  # and stays so after an error: half a prompt was seen
        before_it = self._calls()
        with torch.no_grad(), self.at(source=prompt):
            self._pipe(prompt, **before)  # type: ignore[misc]
        self._running = False
        self._heard += self._calls() - before_it
        self.prompts.append(prompt)

    def _check_taken_up(self, todo: Sequence[str], arguments: Mapping[str, Any]) -> None:
        """Refuse to add to a checkpoint of another run."""
        plain = {name: value for name, value in arguments.items() if not callable(value)}
        words = {name: "a generator" if isinstance(v, torch.Generator) else repr(v) for name, v in plain.items()}
        text = ", ".join(f"{name}={words[name]}" for name in sorted(words))
        others = [prompt for prompt in self._taken_up if prompt not in todo]
        if others:
            raise CalibrationError(
                f"the checkpoint {self.checkpoint} has seen {len(others)} prompts that are not in this run, such as "
                f"{others[0]!r}; name another checkpoint, or delete this one"
            )
        if self._taken_up and self.arguments not in (None, text):
            raise CalibrationError(
                f"the checkpoint {self.checkpoint} was made with {self.arguments or 'no arguments'}; this run has "
                f"{text or 'none'}. Use the same, name another checkpoint, or delete this one"
            )
        self.arguments = text

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
        with self._schedule.at(step_group=step_group, branch=branch, source=source):
            yield

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
        if old is None:
            self.activations[(expert, members[0])] = Cells(activation, self.rows, self.step_groups)
            if self.moments:
                with torch.inference_mode(False):  # a later call may be outside of it, and writes to the same
                    moments = Moments(activation.channels, self.moments, weights[0].device)
                self.activations[(expert, members[0])].moments = moments
        cells = self.activations[(expert, members[0])]

        @torch.inference_mode(False)
        @torch.no_grad()
        def observe(x: Tensor) -> None:
            self.observed += 1
            sketch, sample = cells.cell(self._schedule.where(), x.device)
            # Of a divided sequence a rank may hold the mask whole, or its part.
            kept = kept_tokens(self.mask, x) if self._whole else None
            rows = x if kept is None else x[kept]
            sketch.update(rows)
            if cells.moments is not None:
                cells.moments.update(rows)
            if self.rows:
                sample.update(x, self._schedule.source, self._part * x.shape[-2] if x.dim() > 1 else 0, kept)

        return observe

    # -- results ---------------------------------------------------------------------------------------------------

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
        all_reduce(self, group, over=over)

    def recipe(self, **choices: Any) -> Recipe:
        """Turn the statistics into a recipe: see :func:`tahf4_compiler.calibration.making.make_recipe`."""
        return make_recipe(self, **choices)

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything seen so far to a safetensors file, beside it and renamed."""
        saved.write(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Add what a file holds that :meth:`save` wrote.

        Raises:
            CalibrationError: the file is no such file, or of other weights or step groups.
        """
        self.merge(saved.read(Path(path), self))

    def _take_over(self, other: Seen) -> None:
        self.activations, self.prompts, self.kept = other.activations, other.prompts, other.kept
        self.arguments = other.arguments


def calibrate(
    model: Any,
    *,
    percentile: float = 99.9,
    step_groups: int = 1,
    rows: int = 64,
    moments: int = WIDEST,
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
        moments: channels whose second moments are kept together, a multiple of 64; wider activations are divided. 0
            keeps none: then no weight can be reconstructed.
        checkpoint: file that :meth:`Calibration.run` writes after each prompt, and takes up if it exists.
        options: of the backend, such as ``{"inductor": False}``. What a recipe decides is an argument of
            :meth:`Calibration.recipe` instead.
        sequence_group: the process group among whose ranks a model divides its sequence, in equal parts by rank
            (context parallelism); :meth:`Calibration.all_reduce` puts them together.

    Memory: for each distinct activation, step group and branch ``channels * (404 + rows * bytes of a value)``
    bytes. Wan2.2 A14B has 1,781,760 observed channels an expert: 0.72 GB and, with 64 rows in bfloat16,
    0.23 GB for each expert, step group and branch. The moments take ``4 * channels * moments`` bytes at most for each
    activation: 7.3 GB an expert with 1024.

    Raises:
        OptionError: an argument is of the wrong type or range, or an option is not read.
        CalibrationError: the checkpoint does not fit.
    """
    return Calibration(
        model, percentile=percentile, step_groups=step_groups, rows=rows, moments=moments, checkpoint=checkpoint,
        options=options, sequence_group=sequence_group,
    )  # fmt: skip
