"""Where the calls under a calibration stand: the step, the guidance branch and the input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import OptionError
from ..model.steps import StepCounter
from .calls import Place

__all__ = ["Schedule"]


class Schedule:
    """Follows a pipeline's scheduler and its ``cache_context``, or what :meth:`at` says.

    Attributes:
        source: name of the input at hand.
    """

    def __init__(self, pipe: Any, groups: int) -> None:
        """Follow a pipeline (None for a bare module) in so many parts of its schedule."""
        self._pipe, self._groups = pipe, groups
        self._branch, self.source = "", ""
        self._step: int | None = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
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
        """Say where calls belong: see :meth:`tahf4_compiler.Calibration.at`.

        Args:
            step_group: below ``step_groups``.
            branch: any name, such as ``"cond"`` and ``"uncond"``.
            source: any name of the input.

        Raises:
            OptionError: there is no such step group.
        """
        if step_group is not None and not 0 <= step_group < self._groups:
            raise OptionError(f"step_group is {step_group}; expected 0 to {self._groups - 1}")
        old = self._step, self._branch, self.source
        self._step = step_group if step_group is not None else self._step
        self._branch = branch if branch is not None else self._branch
        self.source = source if source is not None else self.source
        try:
            yield
        finally:
            self._step, self._branch, self.source = old

    @contextlib.contextmanager
    def branches(self, module: nn.Module) -> Iterator[None]:
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

    def where(self) -> tuple[int, str]:
        """Return the part of the schedule and the branch of the call at hand."""
        if self._step is not None:
            return self._step, self._branch
        counter = self._counter()
        return (counter.group(self._groups) if counter is not None else 0), self._branch

    def place(self) -> Place:
        """Return where the call at hand stands."""
        if self._step is not None:
            return Place(self.source, self._branch, self._step, self._groups)
        counter = self._counter()
        if counter is None:
            return Place(self.source, self._branch)
        return Place(self.source, self._branch, min(counter.step, counter.steps - 1), counter.steps)
