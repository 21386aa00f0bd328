"""Find the kernels: those that a wheel brings, or the C++ files of this folder, compiled once.

Inductor's compiler and flags compile them, and the library is kept in its cache. A wheel has no ``operators.cpp``,
which depends on the version of PyTorch: Python calls its kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ...errors import OptionError
from ...torch_private.inductor import cache_folder, is_gcc, library_builder

__all__ = ["SETS", "SOURCES", "instruction_set", "library", "loaded", "operators", "processor", "switch"]

log = logging.getLogger(__name__)

_NAMES = (
    # Side by side, so what takes longest comes first.
    *("operators.cpp", "linear.cpp", "sets.cpp", "kernels.cpp", "search.cpp", "histogram.cpp", "attention.cpp"),
    "checksum.cpp",
    *("common.h", "attention.inc", "attention_operator.inc", "operands.inc", "units.inc", "programs.inc"),
    *("units_avx2.inc", "units_avx512.inc"),
    *("expand.inc", "branches.inc", "tile_avx2.inc", "tile_amx.inc", "tile_span.inc"),
)
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
PREBUILT = Path(__file__).with_name("kernels.so")
"""Where a wheel puts the kernels: all of ``SOURCES`` but ``operators.cpp``. setup.py makes it."""

SETS = ("none", "avx2", "avx_vnni", "avx512_vnni", "amx")
"""Sets of instructions, best last, at the place of their bit in the library: ``kSetNames`` of common.h."""

# Behind Inductor's own flags, so that these have the last word: vectorize loops, and change no bit of a result.
_FLAGS = ("-fno-unsafe-math-optimizations", "-fsigned-zeros", "-ffp-contract=off")
_GCC_FLAGS = ("-ftree-loop-vectorize",)
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1")

_pointer, _int64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "tahf4_quantize": (_pointer, _int, _int64, _int64, _int64, _pointer, _int, _int),
    "tahf4_fused_quantize": (_pointer, _pointer, _int64, _int64, _pointer, _int, _int),
    "tahf4_dequantize": (_pointer, _pointer, _int64, _int64, _pointer, _int),
    "tahf4_linear": (_pointer, _pointer, _int, _int),
    "tahf4_attention": (_pointer, _int, _int),
    "tahf4_transform": (
        *(_pointer, _int, _int64, _int64, _int64, _pointer, _int64),
        *(ctypes.c_float, _pointer, _int),
    ),
    "tahf4_search": (_pointer, _int64, _int64, _int64, _pointer, _int, _int64, _pointer, _pointer, _int),
    "tahf4_descend_unit": (_pointer, _int64, _pointer, _pointer, _pointer, _int),
    "tahf4_round_unit": (_pointer, _int64, _pointer, _pointer, _pointer, _pointer, _int),
    "tahf4_histogram": (_pointer, _int, _int64, _int64, _int64, _pointer, _pointer, _pointer, _pointer, _int),
}
_OPERATORS = {
    "tahf4_add_program": (ctypes.c_char_p, _int, _pointer, _int, _int, _int, _int),
    "tahf4_register": (),
}

_lock = threading.Lock()
_Libraries = tuple[ctypes.CDLL | None, ctypes.CDLL | None]
_loaded: list[_Libraries] = []


def library() -> ctypes.CDLL | None:
    """Return the kernels; None, with one warning, where there are none and they cannot be built.

    The first call compiles, unless a process before it has or a wheel brought them. ``TAHF4_NO_CPP=1`` in the
    environment switches the kernels off, ``TAHF4_NO_COMPILER=1`` the compiler.
    """
    return _both()[0]


def operators() -> ctypes.CDLL | None:
    """Return what holds ``operators.cpp``; None where Python calls the kernels, or there are none."""
    return _both()[1]


def _both() -> _Libraries:
    if switch("TAHF4_NO_CPP") not in ("", "0"):
        return None, None
    if not _loaded:
        with _lock:
            found = _libraries()
            if found[1] is not None:
                found[1].tahf4_register()
            _loaded[:] = [found]
    return _loaded[0]


def loaded() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        RuntimeError: there are none.
    """
    found = library()
    if found is None:
        raise RuntimeError("there are no C++ kernels here (no compiler, or TAHF4_NO_CPP is set); ask available() first")
    return found


def instruction_set() -> str:
    """Return what the integer product runs on: ``"amx"``, ``"avx512_vnni"``, ``"avx_vnni"``, ``"avx2"``, or ``"none"``.

    The best that the processor has, or what ``TAHF4_CPU_ISA`` in the environment names. With ``"none"`` (another
    processor) a linear dequantizes and multiplies in float32, and fused operators are the reference's.

    Raises:
        OptionError: ``TAHF4_CPU_ISA`` names nothing known, or what this processor lacks.
    """
    usable = _usable(loaded().tahf4_instruction_sets())
    wanted = switch("TAHF4_CPU_ISA")
    if wanted and wanted not in usable:
        raise OptionError(f"TAHF4_CPU_ISA is {wanted!r}; expected one of {', '.join(usable)}, which this processor has")
    return wanted or usable[-1]


@functools.cache
def _usable(found: int) -> tuple[str, ...]:
    return tuple(name for bit, name in enumerate(SETS) if bit == 0 or found >> bit & 1)


def switch(name: str) -> str:
    """Return a variable of the environment as it is now; an empty string if there is none.

    ``os.environ`` translates the name at each look-up, which takes as long as a small product.
    """
    if (known := _encoded.get(name)) is None:
        known = _encoded[name] = name.encode() if os.supports_bytes_environ else name.upper()
    found = _environment.get(known)
    return "" if found is None else os.fsdecode(found)


_encoded: dict[str, bytes | str] = {}
_environment: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)


@functools.cache
def _libraries() -> _Libraries:
    """Return the kernels, and the same library once more if it was compiled here: then it holds the operators."""
    kernels = _prebuilt()
    if kernels is not None:
        return kernels, None
    try:
        if switch("TAHF4_NO_COMPILER") not in ("", "0"):
            raise RuntimeError("TAHF4_NO_COMPILER is set")
        found = _load(_build(), {**_SIGNATURES, **_OPERATORS})
        return found, found
    except Exception as error:
        # The first line says what is wrong; a compiler's whole output does not belong in a warning.
        reason = (str(error).strip().splitlines() or [""])[0]
        log.warning(
            "the C++ kernels for the CPU cannot be built, so that the reference runs in their place: %s: %s",
            type(error).__name__,
            reason,
        )
        log.debug("why the C++ kernels cannot be built", exc_info=True)
        return None, None


def _prebuilt() -> ctypes.CDLL | None:
    """Return the kernels of a wheel if it brought them and they run here."""
    if not PREBUILT.exists() or not _machine_flags():
        return None
    try:
        return _load(PREBUILT, _SIGNATURES)
    except (OSError, AttributeError) as error:
        log.warning("the kernels that the wheel of tahf4 brought do not load: %s", error)
        return None


def _load(path: Path, signatures: Mapping[str, Sequence[Any]]) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, arguments in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    found.tahf4_checksum.argtypes = (_pointer, _int64, _pointer, _int)
    found.tahf4_checksum.restype = ctypes.c_uint64
    found.tahf4_instruction_sets.argtypes, found.tahf4_instruction_sets.restype = (), _int
    return found


def _build() -> Path:
    """Return the path of the library, compiled if it is not in the cache.

    OpenMP is linked by the name that Inductor's kernels link (``libgomp.so.1`` or the like), which is in the process
    already, with torch.
    """
    flags = _FLAGS + (_GCC_FLAGS if is_gcc() else ()) + _machine_flags()
    if os.environ.get("TAHF4_CPP_SANITIZE", "") not in ("", "0"):  # for `make sanitize`
        flags += _SANITIZERS

    def builder(sources: Sequence[Path], folder: Path) -> Any:
        return library_builder("tahf4_cpu", [s for s in sources if s.suffix in (".cpp", ".o")], folder, flags)

    def compiled(source: Path) -> Path:
        work = library_builder(source.stem, [source], source.parent, flags, compile_only=True)
        work.build()
        return Path(work.get_target_file_path())

    texts = [source.read_bytes() for source in SOURCES]
    # Code made for one processor or PyTorch may not run with another that shares the cache.
    command = builder([Path(source.name) for source in SOURCES], Path("out")).get_command_line()
    names = (command, processor(), torch.__version__)
    key = hashlib.sha256(b"\0".join((*texts, *(name.encode() for name in names)))).hexdigest()[:32]
    folder = cache_folder() / "tahf4"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = Path(builder(SOURCES, folder).get_target_file_path()).suffix
    path = folder / f"cpu_{key}{suffix}"
    if path.exists():
        return path
    # One process compiles, and the others wait: each rank on a machine would take as long, all at once.
    failed, started = Path(f"{path}.failed"), time.time()
    with _alone(Path(f"{path}.lock")) as waited:
        if path.exists():
            return path
        if waited and failed.exists() and failed.stat().st_mtime >= started:
            raise RuntimeError(f"another process tried at the same time, and its compiler failed ({failed})")
        # Beside its place and then renamed: one that was stopped leaves no part of a file.
        with tempfile.TemporaryDirectory(prefix="build_", dir=folder) as temporary:
            copies = [Path(temporary) / source.name for source in SOURCES]
            for copy, text in zip(copies, texts, strict=True):
                copy.write_bytes(text)
            try:
                files = [copy for copy in copies if copy.suffix == ".cpp"]
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    made = [pool.submit(compiled, file) for file in files]
                    # Shown only when it takes more than a second.
                    for one in tqdm(as_completed(made), "C++ kernels", len(made), unit="file", delay=1.0):
                        one.result()
                    objects = [one.result() for one in made]
                work = builder(objects, Path(temporary))
                work.build()
            except Exception:
                failed.touch()  # whoever waits need not try, too
                raise
            os.replace(work.get_target_file_path(), path)
        failed.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Let one process at a time go on; yield whether this one had to wait.

    Where the lock is another user's, or the file system has none, nobody waits: whoever compiles renames a whole file.
    """
    lock, waited = FileLock(place), False
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(blocking=False))
        except Timeout:
            waited = True
            stack.enter_context(lock)
        except OSError:
            pass
        yield waited


def _machine_flags() -> tuple[str, ...]:
    """Return flags that name the processor: on x86, one with AVX2, whatever this one has beyond.

    The files choose among instructions at run time; everything else then runs as on the least of these processors.
    """
    wanted = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}
    return ("-march=x86-64-v3",) if wanted <= set(processor().split()) else ()


def processor() -> str:
    """Return what code for this processor may use."""
    known = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    # "flags" on x86, "Features" on ARM; the first core speaks for all.
    known += [line for line in lines if line.split("\t")[0].strip() in ("flags", "Features")][:1]
    return "\n".join(known)
