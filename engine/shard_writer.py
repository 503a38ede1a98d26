"""Shards are encoded and written by a thread of its own, while the next batches are being denoised.

What is written does not depend on it: batches reach the thread in order, and one shard is written after the other.
"""

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from diffdfkd.engine.painter import Batch
from diffdfkd.engine.shards import Sample, Sidecar

AHEAD = 2
"""Batches that may wait for the thread; then denoising waits for it."""
LOOK = 0.2
"""Seconds after which a full queue is asked whether its thread still lives."""


class Abandoned(Exception):
    """Denoising failed: the shard that was being written is to vanish."""


class Written(NamedTuple):
    """A shard on disk."""

    sidecar: Sidecar
    seconds: float
    """Processor time of the thread for its encoding and writing, without that of decoding.

    Not the time on the clock: while an engine computes, a thread of Python may stand still until its call returns.
    """
    at: float
    """When it was done, by `time.perf_counter`."""


class ShardWriter:
    """Writes shards in the order in which they are begun; a context manager.

    An error of either side ends the shard, of which nothing is left, and is raised on the caller's.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "shard-writer")
        self.waited = 0.0
        """Seconds that denoising has waited for the thread so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def begin(
        self,
        batches: Iterator[Batch],
        samples: Callable[[Batch], Iterator[Sample | None]],
        write: Callable[[Iterator[Sample | None]], Sidecar],
    ) -> "Future[Written]":
        """Denoise the shard's batches here, while ``write`` takes their ``samples`` in the thread."""
        waiting: queue.Queue[Batch | Abandoned | None] = queue.Queue(AHEAD)
        other = 0.0

        def aside(wait: Callable[[], Any]) -> Any:
            """What is no writing."""
            nonlocal other
            began = time.thread_time()
            try:
                return wait()
            finally:
                other += time.thread_time() - began

        def taken() -> Iterator[Sample | None]:
            while (batch := aside(waiting.get)) is not None:
                if isinstance(batch, Abandoned):
                    raise batch
                yield from samples(batch._replace(finish=partial(aside, batch.finish)))

        def written() -> Written:
            began = time.thread_time()
            sidecar = write(taken())
            return Written(sidecar, time.thread_time() - began - other, time.perf_counter())

        def put(item: Batch | Abandoned | None) -> None:
            began = time.perf_counter()
            _put(waiting, item, future)
            self.waited += time.perf_counter() - began

        future = self._pool.submit(written)
        try:
            for batch in batches:
                put(batch)
        except BaseException:
            put(Abandoned())
            raise
        put(None)
        return future


def _put(waiting: "queue.Queue[Any]", item: Any, future: "Future[Written]") -> None:
    """Wait for room, unless the thread has ended: then its error is raised, or none is left to read the item."""
    while True:
        if future.done():
            if isinstance(item, Abandoned):
                return
            future.result()
            raise RuntimeError("the shard was finished before its last batch")
        try:
            waiting.put(item, timeout=LOOK)
        except queue.Full:
            continue
        return
