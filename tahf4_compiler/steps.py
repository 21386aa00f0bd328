"""Which denoising step runs: counted at the scheduler, outside of everything that is compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

__all__ = ["StepCounter", "StepPrecision"]

_COUNTER = "_tahf4_counter"


class StepCounter:
    """Counts the steps of a diffusers scheduler: ``set_timesteps`` begins a generation, ``step`` ends a step.

    The scheduler gets a class of its own below the one that it had, with these two methods counted. Reading the
    counter costs nothing on a device.

    Attributes:
        step: index of the step that runs, 0 before the first.
        steps: of the generation; 1 before the first ``set_timesteps``.
    """

    def __init__(self) -> None:
        """Stand at the first step; use :meth:`of`."""
        self.step, self.steps = 0, 1

    @classmethod
    def of(cls, scheduler: Any) -> StepCounter:
        """Return the counter of a scheduler, which is counted from the first call on."""
        if not hasattr(scheduler, _COUNTER):
            kind: Any = type(scheduler)
            scheduler.__class__ = _counted(kind)
            setattr(scheduler, _COUNTER, cls())
        counter: StepCounter = getattr(scheduler, _COUNTER)
        return counter

    def group(self, groups: int) -> int:
        """Return which of so many equal parts of the generation the step belongs to."""
        return min(groups - 1, self.step * groups // self.steps)


@functools.cache
def _counted(base: Any) -> Any:
    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        counter = getattr(self, _COUNTER)
        counter.step, counter.steps = 0, max(1, len(self.timesteps))
        return result

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, *args, **kwargs)
        counter = getattr(self, _COUNTER)
        # Schedulers of higher order call the model several times for a timestep; they count on themselves.
        index = getattr(self, "step_index", None)
        counter.step = int(index) if index is not None else counter.step + 1
        return result

    methods = {"set_timesteps": set_timesteps, "step": step, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), methods)


class StepPrecision:
    """Says whether the step at hand runs in high precision.

    Attributes:
        steps: indices of the steps that do; negative ones count from the end.
    """

    def __init__(self, counter: StepCounter, steps: Sequence[int]) -> None:
        """Ask a counter."""
        self._counter = counter
        self.steps = tuple(steps)

    def high(self) -> bool:
        """Return whether it does."""
        step, count = self._counter.step, self._counter.steps
        return any(step == (i if i >= 0 else count + i) for i in self.steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepPrecision:
        """Stay with the counter."""
        return self
