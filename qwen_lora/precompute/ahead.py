"""Work on threads, a bounded distance ahead of whoever takes the results, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def work_ahead(
    tasks: Iterable[Task], work: Callable[[Task], Result], *, workers: int, ahead: int
) -> Generator[tuple[Task, Result]]:
    """Yield (task, work(task)) in the tasks' order; at most `ahead` results wait at any time.

    Tasks are taken lazily. An exception of `work` surfaces at its task's turn. Closing the iterator
    drops what was not started.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="qwen-lora-ahead")
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    source = iter(tasks)
    try:
        for task in source:
            waiting.append((task, pool.submit(work, task)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
