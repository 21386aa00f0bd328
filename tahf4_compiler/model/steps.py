"""Which denoising step runs: counted at the scheduler, outside of everything that is compiled."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..torch_private.tensors import hidden_from_dynamo

__all__ = ["StepCounter", "StepPrecision"]

log = logging.getLogger(__name__)

_COUNTER = "_tahf4_counter"
_METHODS = ("set_timesteps", "set_begin_index", "step")


class StepCounter:
    """Counts the steps of a diffusers scheduler: ``set_timesteps`` begins a generation, ``step`` ends a step.

    ``set_begin_index`` lets one begin in the middle. These methods are shadowed by attributes of this one scheduler,
    with the same signatures; its class stays, so that ``type(scheduler).from_config``, saving and copying work. Reading
    the counter costs nothing on a device.

    Attributes:
        step: index of the step that runs, 0 before the first.
        steps: of the generation; 1 before the first ``set_timesteps``.
        warned: steps that generations did not have, as a warning said.
    """

    def __init__(self) -> None:
        """Stand at the first step; use :meth:`of`."""
        self.step, self.steps = 0, 1
        self.warned: set[tuple[int, ...]] = set()

    @classmethod
    def of(cls, scheduler: Any) -> StepCounter:
        """Return the counter of a scheduler, which is counted from the first call on.

        A scheduler that is under way already says where it is, if it knows (``step_index``).
        """
        if _COUNTER not in scheduler.__dict__:
            counter = cls()
            timesteps = getattr(scheduler, "timesteps", None)
            if getattr(scheduler, "num_inference_steps", None) is not None and timesteps is not None:
                counter.steps = max(1, len(timesteps))
            index = getattr(scheduler, "step_index", None)
            counter.step = int(index) if index is not None else 0
            scheduler.__dict__[_COUNTER] = counter
            for name in _METHODS:
                if hasattr(type(scheduler), name):
                    scheduler.__dict__[name] = _Counted(scheduler, name)
        found: StepCounter = scheduler.__dict__[_COUNTER]
        return found

    @staticmethod
    def counts(scheduler: Any) -> bool:
        """Whether a scheduler is counted."""
        return _COUNTER in scheduler.__dict__

    @staticmethod
    def forget(scheduler: Any) -> None:
        """Count a scheduler no more: it is as it was before :meth:`of`."""
        for name in (_COUNTER, *_METHODS):
            scheduler.__dict__.pop(name, None)

    def group(self, groups: int) -> int:
        """Return which of so many equal parts of the generation the step belongs to."""
        return min(groups - 1, self.step * groups // self.steps)


class _Counted:
    """A method of a scheduler that tells the counter: an object, not a closure, so it can be copied and saved."""

    def __init__(self, scheduler: Any, name: str) -> None:
        self.scheduler, self.name = scheduler, name

    @property
    def __signature__(self) -> inspect.Signature:
        """What diffusers' pipelines look at before they pass optional arguments."""
        return inspect.signature(getattr(type(self.scheduler), self.name).__get__(self.scheduler))

    @hidden_from_dynamo  # a loop over steps that is compiled is divided here: each step's graph asks anew
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = self.scheduler
        result = getattr(type(scheduler), self.name)(scheduler, *args, **kwargs)
        counter = scheduler.__dict__.get(_COUNTER)
        if counter is None:
            return result
        if self.name == "set_timesteps":
            counter.step, counter.steps = 0, max(1, len(scheduler.timesteps))
        elif self.name == "set_begin_index":
            counter.step = int(getattr(scheduler, "begin_index", None) or 0)
        else:
            # Schedulers of higher order call the model several times for a timestep; they count on themselves.
            index = getattr(scheduler, "step_index", None)
            counter.step = int(index) if index is not None else counter.step + 1
        return result


class StepPrecision:
    """Says whether the step at hand runs in high precision.

    Attributes:
        steps: indices of the steps that do; negative ones count from the end.
        bits: of the activations in these steps, where the weights stay in HiF4; None for the original precision, which
            for a packed linear are activations of 16 bits.
    """

    def __init__(self, clock: Any, steps: Sequence[int], bits: int | None = None) -> None:
        """Ask a pipeline for its scheduler of the moment, or a scheduler itself; None is an error when it is asked."""
        self.steps, self.bits = tuple(steps), bits
        self._pipe = weakref.ref(clock) if clock is not None and hasattr(clock, "scheduler") else None
        self._scheduler = clock if self._pipe is None else None
        self._counter()  # counts from now on

    def _counter(self) -> StepCounter | None:
        pipe = self._pipe() if self._pipe is not None else None
        scheduler = pipe.scheduler if pipe is not None else self._scheduler
        return StepCounter.of(scheduler) if scheduler is not None else None

    def high(self) -> bool:
        """Return whether it does.

        Raises:
            RecipeError: the pipeline is gone, or the model was saved and loaded without it.
        """
        counter = self._counter()
        if counter is None:
            raise RecipeError(
                f"the steps {list(self.steps)} run in high precision, but the pipeline that it was applied to is gone, "
                "or none was there, so steps cannot be counted. Apply the recipe to the pipeline that runs the model; "
                "if the model is packed, call tahf4.set_high_precision_steps(pipe)"
            )
        absent = tuple(i for i in self.steps if not -counter.steps <= i < counter.steps)
        if absent and counter.steps > 1 and absent not in counter.warned:  # 1: perhaps nothing was generated yet
            counter.warned.add(absent)  # of all models of a pipeline
            log.warning(
                "steps %s were to have more bits, and this generation has %d: they are without effect; expected "
                "0 to %d, or negative numbers from the end", list(absent), counter.steps, counter.steps - 1,
            )  # fmt: skip
        return any(counter.step == (i if i >= 0 else counter.steps + i) for i in self.steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepPrecision:
        """Follow a pipeline that is copied with the model; stay with the old one where the model is copied alone."""
        clock = self._pipe() if self._pipe is not None else self._scheduler
        copied = memo.get(id(clock), clock)  # perhaps without its attributes yet
        other = StepPrecision(None, self.steps, self.bits)
        other._pipe = weakref.ref(copied) if self._pipe is not None and copied is not None else None
        other._scheduler = copied if self._pipe is None else None
        return other

    def __reduce__(self) -> Any:
        """Leave the pipeline behind when the model is saved whole."""
        return StepPrecision, (self._scheduler, self.steps, self.bits)
