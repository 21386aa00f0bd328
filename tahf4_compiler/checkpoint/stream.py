"""One file of weights, written as a stream: read, pack and write overlap, and memory does not grow with the model."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, RecipeError
from ..files.reading import DTYPES, opened, read_into
from ..weights.checksum import checksum
from ..weights.flaws import Flaws
from .fp4 import Fp4Weight
from .layout import Item, Shard
from .losses import Losses

__all__ = ["Workers", "write_shard"]

_ROWS = 1 << 21  # values of a weight that are read and packed at a time: they stay in the cache
_COPY = 4 << 20  # bytes of a tensor that is copied

Progress = Callable[[int], object]


class Workers:
    """Threads that read and pack linears ahead of the one that writes.

    Args:
        count: of threads; each holds one packed linear, and one more waits.
        sums: checksums that weights must have, by module path within the component.

    Attributes:
        flaws: of the linears' weights.
        losses: of those that another tool held in 4 bits.
    """

    def __init__(self, count: int, sums: Mapping[str, int]) -> None:
        """Start no thread yet."""
        self.count, self.sums = count, sums
        self.flaws, self.losses = Flaws(), Losses()
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self._local = threading.local()

    def packed(self, items: list[Item]) -> Generator[tuple[Item, list[Tensor]], None, None]:
        """Yield the items that are packed with their codes and scales, in order."""
        waiting: deque[tuple[Item, Future[list[Tensor]]]] = deque()
        rest = iter(items)
        try:
            while True:
                while len(waiting) <= self.count and (item := next(rest, None)) is not None:
                    waiting.append((item, self._pool.submit(self._pack, item)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(cancel_futures=True)

    def _pack(self, item: Item) -> list[Tensor]:
        info, transform = item.source, item.transform
        assert info is not None and transform is not None
        n, k = info.shape
        wanted = self.sums.get(item.path)
        # Checksums and branches are of whole weights.
        whole = wanted is not None or transform.reconstruction is not None or transform.low_rank is not None
        rows = n if whole else max(1, _ROWS // max(1, k))
        codes, scales = (torch.empty(shape, dtype=DTYPES[dtype], device="cpu") for _, dtype, shape in item.outputs)
        with opened(info.path) as file, torch.no_grad():
            for first in range(0, n, rows):
                count = min(rows, n - first)
                if isinstance(info, Fp4Weight):
                    part = info.read(first, count)
                else:
                    part = self._buffer(count * k, DTYPES[info.dtype]).view(count, k)
                    read_into(file, info.offset + first * k * part.element_size(), part)
                part = part.to(DTYPES[item.dtype])
                if wanted is not None and int(checksum(part)) != wanted:
                    raise RecipeError(
                        f"{item.path} has other weights than those that were calibrated, in this precision. Use the "
                        "recipe that was made for this model; --no-check-weights accepts other weights."
                    )
                packed = transform.pack(part)
                rest = transform.remainder(part)
                self.flaws.look(item.path, rest, packed, transform.mask, transform.seed, transform.hadamard_block)
                if isinstance(info, Fp4Weight):
                    self.losses.look(item.path, rest, packed, transform)
                codes[first : first + count] = packed.codes
                scales[first : first + count] = packed.scales
        return [codes, scales]

    def _buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory of this thread: fresh memory for each weight would cost more than reading it."""
        held: dict[torch.dtype, Tensor] = self._local.__dict__.setdefault("buffers", {})
        if dtype not in held or held[dtype].numel() < count:
            held[dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return held[dtype][:count]


def write_shard(shard: Shard, path: Path, workers: Workers, progress: Progress) -> tuple[int, str]:
    """Write a file.

    Args:
        shard: what it holds.
        path: replaced if it is there.
        workers: that pack its linears.
        progress: called with the number of bytes that were read.

    Returns:
        Its size and SHA-256.

    Raises:
        CheckpointError: a file cannot be read any more.
        RecipeError: a weight is not the one that was calibrated.
        OSError: it cannot be written.
    """
    found, size = hashlib.sha256(), 0
    packed = workers.packed([item for item in shard.items if item.transform is not None])
    with path.open("wb", buffering=0) as out:

        def write(data: memoryview) -> None:
            nonlocal size
            found.update(data)
            size += len(data)
            while len(data):
                data = data[out.write(data) :]

        write(memoryview(shard.header))
        try:
            for item in shard.items:
                if item.transform is not None:
                    made, parts = next(packed)
                    assert made is item
                    for part in parts:
                        write(_bytes(part))
                elif item.value is not None:
                    write(_bytes(item.value))
                elif item.make is not None:
                    for part in item.make():
                        write(_bytes(part))
                else:
                    for chunk in _chunks(item):
                        write(_bytes(chunk))
                if item.source is not None:
                    progress(item.source.size)
        finally:
            packed.close()
    if size != shard.size:
        raise CheckpointError(f"{path} got {size:,} bytes instead of {shard.size:,}; this is a defect of tahf4")
    return size, found.hexdigest()


def _chunks(item: Item) -> Iterator[Tensor]:
    info = item.source
    assert info is not None
    if isinstance(info, Fp4Weight):
        n, k = info.shape
        rows = max(1, _COPY // (4 * k))
        for first in range(0, n, rows):
            yield info.read(first, min(rows, n - first)).to(DTYPES[item.dtype])
        return
    width = DTYPES[info.dtype].itemsize
    with opened(info.path) as file:
        for start in range(0, info.size, _COPY):
            part = torch.empty(min(_COPY, info.size - start) // width, dtype=DTYPES[info.dtype], device="cpu")
            read_into(file, info.offset + start, part)
            yield part.to(DTYPES[item.dtype])


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data
