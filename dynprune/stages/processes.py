"""Sharing work out to processes of this machine, each with an SLM of its own.

On a CPU two processes with a thread each do more than one with two: generation is many small operations, between which threads
wait for each other.
"""

import logging
import math
import os
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from dynprune.messages import quieten
from dynprune.slm.generation import check_batch_size
from dynprune.slm.prompt_states import check_capacity
from dynprune.stages.run import Run, portable_config

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
Job = Callable[[Run, Sequence[Item], int], Iterator[Result]]
"""Does some of the work: from a run, the items, and the memory in bytes for what configurations of one prompt share."""

_SECONDS_BETWEEN_LOOKS = 2.0


def check_job(run: Run) -> None:
    """Checks the settings of a job that generates: in a sentence, where each process would say it in a traceback.

    Raises:
        ValueError: If a batch would have no rows, or memory is negative.
    """
    check_batch_size(run.config.hardware.batch_size)
    check_capacity(run.shared_bytes)


def shared_out(run: Run, job: Job[Item, Result], items: Sequence[Item], least: int) -> Generator[Result, None, None]:
    """Does a job in as many processes as ``hardware.processes`` allows and the items are worth.

    Args:
        run: The run.
        job: The job; with more than one process, something that can be pickled.
        items: What it is done on.
        least: A process takes some 20 s to start, so each gets so many items at least.

    Yields:
        The results, in the order in which they come.

    Raises:
        RuntimeError: If one of the processes fails or dies.
    """
    processes = min(run.config.hardware.processes, len(items) // least)
    if processes < 2:
        yield from job(run, items, run.shared_bytes)
        return
    context = get_context("spawn")
    results: Queue[tuple[int, list[Result] | str | None]] = context.Queue()
    threads = max(1, torch.get_num_threads() // processes)
    shared_bytes = run.shared_bytes // processes
    config = portable_config(run)
    # Rows in flight hold most of the memory.
    config.hardware.batch_size = math.ceil(config.hardware.batch_size / processes)
    workers = {
        number: context.Process(
            target=_work,
            args=(config, job, items[number::processes], shared_bytes, threads, number, results),
            daemon=True,
        )
        for number in range(processes)
    }
    # Of no effect here, where tqdm has read it already: in the processes, bars of loading would run across this one's bar.
    os.environ["TQDM_DISABLE"] = "1"
    log.info("sharing the work out to %d processes, %d threads each", processes, threads)
    try:
        for worker in workers.values():
            worker.start()
        yield from _received(workers, results)
    finally:
        for worker in workers.values():
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _received(workers: Mapping[int, SpawnProcess], results: "Queue[tuple[int, list[Result] | str | None]]") -> Iterator[Result]:
    """What the processes send, until all have said that they are done."""
    working = set(workers)
    while working:
        # Looked at before the queue is: what a process sent before it ended is in the queue then.
        ended = [number for number in working if not workers[number].is_alive()]
        try:
            number, result = results.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except Empty:
            if ended:
                raise RuntimeError(
                    f"one of several processes ended with exit code {workers[ended[0]].exitcode}, for lack of memory "
                    "perhaps; what is done is kept: type the same command again, with hardware.processes=1"
                ) from None
            continue
        if isinstance(result, str):
            raise RuntimeError(f"one of several processes failed:\n{result}")
        if result is None:
            working.remove(number)
        else:
            yield from result


def _work(
    config: DictConfig,
    job: Job[Any, Any],
    items: Sequence[Any],
    shared_bytes: int,
    threads: int,
    number: int,
    results: "Queue[tuple[int, list[Any] | str | None]]",
) -> None:
    """What one of several processes does: its share of the job, each result sent when it is there."""
    torch.set_num_threads(threads)
    quieten()
    parent = parent_process()
    assert parent is not None
    try:
        for result in job(Run(config), items, shared_bytes):
            if not parent.is_alive():
                return
            # In a list, which tells it from a failure, whatever it is.
            results.put((number, [result]))
        results.put((number, None))
    except Exception:
        # Not the exception itself: not every one survives the way to another process.
        results.put((number, traceback.format_exc()))
