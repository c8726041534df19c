"""Jobs that read and compute, run side by side as far as threads and memory go."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional

import torch


@dataclass
class Job:
    """A piece of work with an input that can be read ahead.

    Attributes:
        read: reads the input.
        compute: computes the result from the input.
        input_bytes: memory that the input takes.
        total_bytes: memory that the job takes, its input included.
        alone: whether it runs by itself, with all threads; otherwise in parallel with others, with one thread.
    """

    read: Callable[[], Any]
    compute: Callable[[Any], Any]
    input_bytes: int
    total_bytes: int
    alone: bool

    def run(self) -> Any:
        return self.compute(self.read())


def run_jobs(
    jobs: Sequence[Job], max_memory: Optional[int] = None, progress: Callable[[Iterable], Iterable] = iter
) -> Iterator[Any]:
    """Yield the result of every job, in order, with as many jobs at a time as fit into `max_memory` bytes.

    While a job runs alone, the input of the next one is read, if that one runs alone, too. An eigenproblem of a few
    hundred rows leaves all but one thread idle; several at a time do not.
    """
    threads = torch.get_num_threads()
    room = max_memory or math.inf
    waiting: deque[tuple[Future, int]] = deque()
    read_ahead: Optional[Future] = None
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for job, following in zip(progress(jobs), [*jobs[1:], None]):
                while waiting and job.total_bytes + sum(taken for _, taken in waiting) > room:
                    yield waiting.popleft()[0].result()
                if job.alone or threads == 1:
                    job_input = read_ahead.result() if read_ahead else job.read()
                    fits = following and following.alone and job.total_bytes + following.input_bytes <= room
                    read_ahead = pool.submit(following.read) if fits else None
                    result = job.compute(job_input)
                    del job_input  # not to be in memory while others run
                    yield result
                    del result
                    continue
                waiting.append((pool.submit(job.run), job.total_bytes))
                if len(waiting) > threads:
                    yield waiting.popleft()[0].result()
            yield from (future.result() for future, _ in waiting)
    finally:
        torch.set_num_threads(threads)
