"""Put faults into the source, one at a time, and see that the tests notice: ``make mutants``.

``mutants.toml`` names for each fault the file, a text that stands in it exactly once, the text in its place, and the
tests that must fail. A fault that no test can tell from the original says why (``equivalent``) and is not run.
Importing PyTorch takes longer than most tests, so each worker imports it once and forks for each run.

Usage: ``python tests/mutants.py [--workers 2] [part of a file's name or of a text ...]``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
FAILED = 1  # exit code of pytest where tests failed; others mean that it could not run them
NOTHING = 5  # where there are no tests
LIMIT = 600
TIMED_OUT = -1
WARM = ("hypothesis", "networkx", "pytest", "torch", "torch._dynamo", "torch.export", "torch.utils.weak", "tqdm.auto")
"""What tests import, but for the package itself."""


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        file: path in the repository.
        old: text that is replaced.
        new: text in its place.
        tests: that must fail.
        equivalent: why nothing can tell it from the original.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""

    def __str__(self) -> str:
        """Name the file and the change in one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old[:90]!r} -> {new[:90]!r}"


@dataclass
class Tree:
    """A copy of the repository whose package is imported from it, not from where it is installed.

    Attributes:
        path: of the copy.
        clock: grows with each change, so that compiled Python files are seen to be old.
    """

    path: Path
    clock: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def copy(cls, path: Path) -> Tree:
        """Copy what git knows or would add, and lay the packages out as they are imported."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True,
        ).stdout.decode()  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        places: dict[str, str] = _toml(path / "pyproject.toml")["tool"]["setuptools"]["package-dir"]
        for package in sorted(places, key=len):
            folder = path / "lib" / package.replace(".", "/")
            folder.mkdir(parents=True, exist_ok=True)
            for entry in (path / places[package]).iterdir():
                if not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
        return cls(path)

    @functools.cached_property
    def server(self) -> subprocess.Popen[str]:
        """The process that runs this tree's tests: see :func:`serve`."""
        return subprocess.Popen(
            [sys.executable, __file__, "--serve"], cwd=self.path / "lib", env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, tests: tuple[str, ...]) -> tuple[int, str]:
        """Run tests; return pytest's exit code, or :data:`TIMED_OUT`, and its last lines."""
        command = ["-q", "-x", "-p", "no:cacheprovider", "-c", "../pyproject.toml", "--rootdir", "..",
                   *(f"../{test}" for test in tests)]  # fmt: skip
        # Where one test is named, that one runs however slow it is; so does a file that has no others.
        code, shown = NOTHING, ""
        if not any("::" in test for test in tests):
            code, shown = self._ask([*command, "-m", "not slow"])
        return self._ask(command) if code == NOTHING else (code, shown)

    def _ask(self, command: list[str]) -> tuple[int, str]:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        code, shown = json.loads(self.server.stdout.readline())
        return code, shown

    def close(self) -> None:
        """End the process that runs tests."""
        self.server.communicate()

    def write(self, file: str, text: str) -> None:
        """Change a file."""
        self.clock += 2
        (self.path / file).write_text(text)
        os.utime(self.path / file, (self.clock, self.clock))

    def survives(self, mutant: Mutant) -> str:
        """Put a fault in, run its tests and take it out again; return what is wrong, or an empty string if it dies."""
        original = (ROOT / mutant.file).read_text()
        if (count := original.count(mutant.old)) != 1:
            return f"its text is in the file {count} times; expected once"
        self.write(mutant.file, original.replace(mutant.old, mutant.new))
        code, shown = self.run(mutant.tests)
        self.write(mutant.file, original)
        if code == 0:
            return "survived"
        # A test that never ends is noticed.
        return "" if code in (FAILED, TIMED_OUT) else f"its tests could not be run (exit code {code}):\n{shown}"


def serve() -> None:
    """Run pytest in a fork for each line of arguments (JSON); answer with its exit code and its last lines."""
    for name in WARM:
        importlib.import_module(name)
    # The folder that is run in comes first on the path, so that its packages are the ones imported.
    sys.path[0] = os.getcwd()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if not child:
                _tests(json.loads(line), output.fileno())
            code = _wait(child)
            output.seek(0)
            print(json.dumps([code, output.read().decode(errors="replace")[-3000:]]), flush=True)


def _tests(arguments: list[str], output: int) -> NoReturn:
    code = 3  # pytest's for an internal error
    try:
        os.setsid()  # so that what tests start can be ended with them
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if any("tests/interpreter" in argument for argument in arguments):  # Triton decides where it is imported
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
        importlib.invalidate_caches()
        code = int(importlib.import_module("pytest").main(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    """Return the exit code of a process; end it if it takes too long."""
    late = time.monotonic() + LIMIT
    while time.monotonic() < late:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMED_OUT


def read(path: Path = ROOT / "tests" / "mutants.toml") -> list[Mutant]:
    """Return the faults of a file."""
    found = [Mutant(**{**entry, "tests": tuple(entry.get("tests", ()))}) for entry in _toml(path)["mutant"]]
    for mutant in found:
        if bool(mutant.tests) == bool(mutant.equivalent):
            raise ValueError(f"{mutant}: expected tests, or why it is equivalent")
    return found


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def main() -> int:
    """Run the faults; return 1 if one survives or cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="run the faults with one of these texts in their file or change")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    every = [m for m in read() if not arguments.parts or any(p in str(m) or p in m.old for p in arguments.parts)]
    mutants = [m for m in every if not m.equivalent]
    trees: queue.Queue[Tree] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for i in range(arguments.workers):
            trees.put(tree := Tree.copy(Path(folder, str(i))))
            stack.callback(tree.close)

        def with_tree(action: Any, argument: Any) -> Any:
            tree = trees.get()
            try:
                return action(tree, argument)
            finally:
                trees.put(tree)

        def check(mutant: Mutant) -> str:
            wrong: str = with_tree(Tree.survives, mutant)
            print(f"{'killed  ' if not wrong else 'SURVIVED'} {mutant}" + (f": {wrong}" if wrong else ""), flush=True)
            return wrong

        # Tests that fail anyway would kill everything.
        files = sorted({test.partition("::")[0] for mutant in mutants for test in mutant.tests})

        def fails(file: str) -> str:
            code, shown = with_tree(Tree.run, tuple(_named(file, mutants)))
            if code == TIMED_OUT:
                return f"{file}: not done after {LIMIT} s\n{shown}"
            return f"{file}\n{shown}" if code else ""

        with ThreadPoolExecutor(arguments.workers) as pool:
            for shown in filter(None, pool.map(fails, files)):
                print(f"tests fail without a fault:\n{shown}")
                return 1
        with ThreadPoolExecutor(arguments.workers) as pool:
            wrong = [text for text in pool.map(check, mutants) if text]
    print(f"{len(mutants) - len(wrong)} killed, {len(wrong)} not, {len(every) - len(mutants)} equivalent")
    return 1 if wrong else 0


def _named(file: str, mutants: list[Mutant]) -> list[str]:
    """Return a file, or those of its tests that are named, if none names it whole."""
    named = sorted({test for m in mutants for test in m.tests if test.partition("::")[0] == file})
    return [file] if file in named else named


if __name__ == "__main__":
    sys.exit(main())
