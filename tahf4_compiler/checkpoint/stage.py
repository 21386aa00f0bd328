"""The folder beside its place in which a checkpoint grows, and the list of what is finished there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, Tahf4Error
from ..files.reading import read_json
from .manifest import PROGRESS, file_sha256

__all__ = ["Stage", "drop_list", "staged"]


def drop_list(folder: Path) -> None:
    """Remove the list of what is finished, which a run that was killed in its last moment leaves in its result."""
    (folder / PROGRESS).unlink(missing_ok=True)


class Stage:
    """Files that are written under another name and listed when they are whole.

    Args:
        out: the folder that it becomes.
        job: what the files are made of and how; files of another job are dropped.

    Raises:
        CheckpointError: another process writes there, or nothing can be written there.
    """

    def __init__(self, out: Path, job: str) -> None:
        """Take up what an earlier run of the same job left; its finished files are read and compared again."""
        self.out, self.job = out, job
        self.folder = out.parent / f".{out.name}.tahf4-partial"
        self.done: dict[str, tuple[int, str]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as cause:
            raise CheckpointError(f"cannot write beside {out}: {cause.strerror}; name another folder") from cause
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            os.close(self._lock)
            raise CheckpointError(f"another command of tahf4 is writing {out}; wait, or name another folder") from cause
        try:
            self._take_up()
        except OSError as cause:
            self.close()
            raise CheckpointError(f"cannot write beside {out}: {cause.strerror}; name another folder") from cause

    def _take_up(self) -> None:
        try:
            listed = read_json(self.folder / PROGRESS)
            if listed.get("job") == self.job:
                for name, (size, digest) in listed["files"].items():
                    path = self.folder / name
                    if path.is_file() and path.stat().st_size == size and file_sha256(path) == (size, digest):
                        self.done[name] = (size, digest)
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            self.done = {}
        kept = {*self.done, PROGRESS}  # without the list, what is finished would be lost
        for base, folders, files in os.walk(self.folder, topdown=False):
            for name in files:
                if (path := Path(base) / name).relative_to(self.folder).as_posix() not in kept:
                    path.unlink()
            for name in folders:
                if not any((Path(base) / name).iterdir()):
                    (Path(base) / name).rmdir()
        self._write_list()

    def partial(self, name: str) -> Path:
        """Return where a file is written until it is finished."""
        path = self.folder / f"{name}.part"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str, found: tuple[int, str]) -> None:
        """Give a file its name, and list it with its size and hash."""
        (self.folder / f"{name}.part").replace(self.folder / name)
        self.done[name] = found
        self._write_list()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, unless it is finished."""
        if name not in self.done:
            self.partial(name).write_bytes(data)
            self.finish(name, (len(data), hashlib.sha256(data).hexdigest()))

    def _write_list(self) -> None:
        beside = self.folder / f"{PROGRESS}.part"
        beside.write_text(json.dumps({"job": self.job, "files": self.done}), encoding="utf-8")
        beside.replace(self.folder / PROGRESS)

    def publish(self) -> None:
        """Make the folder what it stands beside; an empty folder there is replaced.

        Raises:
            CheckpointError: it cannot be renamed; it stays where it is.
        """
        try:
            self.folder.replace(self.out)
        except OSError as cause:
            raise CheckpointError(
                f"cannot rename {self.folder} to {self.out}: {cause.strerror}. The checkpoint is whole and waits "
                "there: make way for it and run the same command again, or move it yourself."
            ) from cause
        with contextlib.suppress(OSError):  # the next run removes it, and verify passes it by
            drop_list(self.out)

    def drop(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def drop_unfinished(self) -> None:
        """Remove what is half written; what is finished serves the next run."""
        for path in self.folder.rglob("*.part"):
            path.unlink(missing_ok=True)
        if not self.done:
            self.drop()

    def close(self) -> None:
        """Let others write."""
        os.close(self._lock)


@contextlib.contextmanager
def staged(out: Path, job: str) -> Iterator[Stage]:
    """Yield the stage of a folder, and make it that folder at the end; what a run leaves waits for the next one.

    Raises:
        CheckpointError: as :class:`Stage`; or a file could not be read or written, and what is finished waits.
    """
    stage = Stage(out, job)
    try:
        yield stage
    except (OSError, CheckpointError) as cause:
        stage.drop_unfinished()
        what, mend = str(cause).rstrip("."), "mend this"
        if isinstance(cause, OSError):
            what, mend = f"cannot write {out}: {cause.strerror or cause}", "make room"
        raise CheckpointError(
            f"{what}. What is finished waits in {stage.folder}: {mend} and run the same command again, or delete it."
        ) from cause
    except Tahf4Error:
        stage.drop()
        raise
    else:
        stage.publish()
    finally:
        stage.close()
