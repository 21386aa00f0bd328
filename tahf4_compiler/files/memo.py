"""Numbers that took long to measure, kept in a file as they come, so that a run that was stopped takes up there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .replacing import replacing

__all__ = ["Measured"]

log = logging.getLogger(__name__)

FORMAT = "tahf4-measured-1"


class Measured:
    """Measures each number once, also over several runs.

    Attributes:
        path: of the file, or None for none.
    """

    def __init__(self, path: Path | None, key: Callable[[], str]) -> None:
        """Take up what a file holds for the same key; numbers of another key are dropped.

        Args:
            path: of the file, which need not be there.
            key: gives what everything that is measured depends on, as a digest; asked only if there is a path.
        """
        self.path = path
        self._key = key() if path is not None else ""
        self._values: dict[str, float | None] = self._load() if path is not None and path.is_file() else {}

    def value(self, name: str, measure: Callable[[], float | None]) -> float | None:
        """Return the number of a name, measured now if it was not before; None is kept as well."""
        if name not in self._values:
            self._values[name] = measure()
            self._save()
        return self._values[name]

    def _load(self) -> dict[str, float | None]:
        assert self.path is not None
        try:
            found: Any = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["key"] != self._key:
                log.info("%s holds measurements of something else; everything is measured again", self.path)
                return {}
            values: dict[str, float | None] = found["values"]
            if not all(v is None or (isinstance(v, float) and not v < 0) for v in values.values()):
                raise ValueError("a value is no number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be read (%s); everything is measured again", self.path, error)
            return {}
        log.info("%d measurements are taken from %s", len(values), self.path)
        return values

    def _save(self) -> None:
        if self.path is None:
            return
        content = {"format": FORMAT, "key": self._key, "values": self._values}
        try:
            with replacing(self.path) as beside:
                beside.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            text = "%s cannot be written (%s); a run that is stopped will measure everything again"
            log.warning(text, self.path, error)
            self.path = None

