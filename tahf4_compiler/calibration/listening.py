"""A model under calibration: compiled with observers, its calls listened to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import CalibrationError
from ..options import Options
from ..packed.plan import plan_modules, why_nothing
from ..torch_private.calls import compiled_whole
from .calls import copied
from .padding import token_mask
from .schedule import Schedule
from .seen import Seen

__all__ = ["Listener", "observed"]


class Listener:
    """Keeps a few of an expert's calls, and checks that each was observed.

    Attributes:
        calls: that were heard.
    """

    def __init__(self, seen: Seen, schedule: Schedule, expert: str) -> None:
        """Listen to an expert."""
        self._seen, self._schedule, self._expert = seen, schedule, expert
        self.calls = 0

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Keep the arguments; return a mark for :meth:`after`."""
        self.calls += 1
        self._seen.kept.offer(self._expert, self._schedule.place(), functools.partial(copied, args, kwargs))
        self._seen.mask = token_mask(self._seen.models[self._expert], args, kwargs)
        return self._seen.observed

    def after(self, mark: int) -> None:
        """Check that the call was observed.

        Raises:
            CalibrationError: it was not.
        """
        if self._seen.observed == mark:
            model, name = self._seen.models[self._expert], self._expert or "the module"
            plan = plan_modules(model, check_weights=False)
            if not mark and not any(decision.decision == "hif4" for decision in plan):
                raise CalibrationError(
                    f"there is nothing to calibrate: nothing of {name} ({type(model).__name__}) runs in 4 bits: "
                    f"{why_nothing(model, plan)}"
                )
            raise CalibrationError(
                f"a call of {name} was not observed: torch.compile ran it as it is. It may be "
                "switched off (TORCHDYNAMO_DISABLE), not support this model, or be past its recompile limit, with too "
                "many shapes in one process (raise torch._dynamo.config.recompile_limit, or calibrate with fewer). If "
                "routers choose tokens in its forward, set torch._dynamo.config.capture_dynamic_output_shape_ops = True"
            )


@contextlib.contextmanager
def observed(module: nn.Module, options: Options, listen: Listener) -> Iterator[None]:
    """Compile a module whole, show its calls to a listener, and put it back as it was."""

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def heard(*args: Any, **kwargs: Any) -> Any:
            mark = listen.before(args, kwargs)
            result = call(*args, **kwargs)
            listen.after(mark)
            return result

        return heard

    # Equal options are one backend for Dynamo, which keeps what each compiled, up to a limit.
    options = replace(options, pipeline="calibration", attention="high_precision")
    settings: dict[str, Any] = {"backend": "tahf4", "options": options}
    with compiled_whole(module, around, **settings):
        yield
