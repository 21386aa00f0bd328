"""What goes wrong on the command line."""

from __future__ import annotations

from ..errors import Tahf4Error

__all__ = ["CommandError", "own_error"]


class CommandError(Tahf4Error, ValueError):
    """A command was asked for something that it cannot do."""


def own_error(error: BaseException | None) -> Tahf4Error | None:
    """Return the error of this project that an exception is or stands for, or None.

    Dynamo wraps what a backend raises in ``BackendCompilerFailed``, whose ``inner_exception`` it was.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Tahf4Error):
            return error
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None
