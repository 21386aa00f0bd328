"""A run that is killed, at whatever line, loses no file that it had finished."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

from tahf4_compiler.checkpoint import stage as module
from tahf4_compiler.checkpoint.manifest import PROGRESS
from tahf4_compiler.checkpoint.stage import Stage

FILES = ("a", "sub/b", "c")


def run(out: Path, told: Path) -> None:
    """Write what is missing, and tell of each file that is finished."""
    stage = Stage(out, "job")
    for name in FILES:
        if name not in stage.done:
            stage.partial(name).write_text(name)
            stage.finish(name, (len(name), hashlib.sha256(name.encode()).hexdigest()))
            with told.open("a") as file:
                file.write(f"{name}\n")
    stage.publish()
    stage.close()


def killed_before(line: int, out: Path, told: Path) -> bool:
    """Run in a process that ends before the given line of all that it runs of the module; whether it got there."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    child = os.fork()
    if not child:
        try:
            sys.settrace(trace)
            run(out, told)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_line_loses_no_finished_file(tmp_path):
    # What an earlier run left: two files, a third that was half written, and a file that nobody listed.
    earlier = Stage(tmp_path / "earlier", "job")
    for name in FILES[:2]:
        earlier.partial(name).write_text(name)
        earlier.finish(name, (len(name), hashlib.sha256(name.encode()).hexdigest()))
    earlier.partial("c").write_text("half")
    (earlier.folder / "stray").write_text("x")
    (earlier.folder / f"{PROGRESS}.part").write_text("half")
    earlier.close()
    ends = set()
    for line in count():
        place = tmp_path / str(line)
        place.mkdir()
        out, told = place / "out", place / "told"
        left = place / earlier.folder.name.replace("earlier", "out")
        shutil.copytree(earlier.folder, left)
        told.write_text("".join(f"{name}\n" for name in FILES[:2]))
        killed = killed_before(line, out, told)
        finished = set(told.read_text().split())
        if out.exists():
            assert {name for name in FILES if (out / name).read_text() == name} == set(FILES)
        else:
            stage = Stage(out, "job")
            assert finished <= set(stage.done), f"lost by a kill before line {line} of the run"
            assert set(json.loads((stage.folder / PROGRESS).read_text())["files"]) == set(stage.done)
            files = {p.relative_to(stage.folder).as_posix() for p in stage.folder.rglob("*") if p.is_file()}
            assert files == {*stage.done, PROGRESS}
            stage.close()
        ends.add((len(finished), out.exists()))
        if not killed:
            break
    assert ends == {(2, False), (3, False), (3, True)}, "the kills came before, between and after"
