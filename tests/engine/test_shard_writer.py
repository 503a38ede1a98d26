"""Batches are denoised here and written there, in order; an error on either side is raised here."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffdfkd.engine.painter import Batch
from diffdfkd.engine.shard_writer import AHEAD, Abandoned, ShardWriter


def batch(number: int, finish: Any = lambda: None) -> Batch:
    return Batch(torch.tensor([number]), torch.tensor([0]), finish)


def numbers(given: Batch) -> Iterator[Any]:
    given.finish()
    yield int(given.ids)


def test_samples_arrive_in_order_in_another_thread() -> None:
    seen: list[Any] = []

    def write(samples: Iterator[Any]) -> Any:
        seen.append(threading.current_thread().name)
        return list(samples)

    with ShardWriter() as writer:
        first = writer.begin(map(batch, range(9)), numbers, write)
        second = writer.begin(map(batch, range(9, 12)), numbers, write)
    assert first.result().sidecar == [*range(9)] and second.result().sidecar == [9, 10, 11]
    assert all(name.startswith("shard-writer") for name in seen)


def test_an_error_of_the_writing_is_raised_where_batches_are_made() -> None:
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(100):
            made.append(number)
            yield batch(number)

    def write(samples: Iterator[Any]) -> Any:
        next(samples)
        raise OSError(28, "No space left on device")

    with ShardWriter() as writer, pytest.raises(OSError, match="No space"):
        writer.begin(batches(), numbers, write)
    # It was not denoised to the end for nothing.
    assert len(made) <= AHEAD + 3


def test_an_error_of_the_denoising_abandons_the_shard() -> None:
    ended: list[BaseException] = []

    def batches() -> Iterator[Batch]:
        yield batch(0)
        raise RuntimeError("out of memory")

    def write(samples: Iterator[Any]) -> Any:
        try:
            return list(samples)
        except BaseException as error:
            ended.append(error)
            raise

    with ShardWriter() as writer, pytest.raises(RuntimeError, match="out of memory"):
        writer.begin(batches(), numbers, write)
    assert len(ended) == 1 and isinstance(ended[0], Abandoned)


def spin(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def test_seconds_are_of_the_writing_alone() -> None:
    """Neither of waiting for a batch, nor of decoding one, nor of standing still."""
    work = 0.2

    def batches() -> Iterator[Batch]:
        for number in range(2):
            time.sleep(work)
            yield batch(number, lambda: spin(work))

    def idle(samples: Iterator[Any]) -> Any:
        time.sleep(work)
        return list(samples)

    def busy(samples: Iterator[Any]) -> Any:
        spin(work)
        return list(samples)

    with ShardWriter() as writer:
        before = time.perf_counter()
        quick = writer.begin(batches(), numbers, idle).result()
        slow = writer.begin(batches(), numbers, busy).result()
        assert before < quick.at < slow.at <= time.perf_counter()
    assert quick.seconds < work / 2 and slow.seconds >= work


def test_denoising_that_waits_is_counted() -> None:
    nap = 0.3

    def write(samples: Iterator[Any]) -> Any:
        time.sleep(nap)
        return list(samples)

    with ShardWriter() as writer:
        writer.begin(map(batch, range(AHEAD - 1)), numbers, write).result()
        assert writer.waited < nap
        # What comes beyond the queue waits for the thread to take some.
        writer.begin(map(batch, range(AHEAD + 2)), numbers, write).result()
        assert writer.waited >= nap / 2
