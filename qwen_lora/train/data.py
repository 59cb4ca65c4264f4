# ruff: noqa: TID253
"""From a plan to tensors on the host: records read, captions chosen, noise and sigmas drawn.

A micro-batch's tensors are a pure function of (plan, epoch); threads only read ahead, in order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen_lora.errors import QwenLoraError, ShardError
from qwen_lora.families.base import Family
from qwen_lora.shards.remote.store import RemoteStore
from qwen_lora.train.look_ahead import LookAhead, RemoteFile
from qwen_lora.train.objective import FlowTokens
from qwen_lora.train.plan import (
    UNCONDITIONAL,
    BatchRule,
    EpochPlan,
    MicroBatch,
    Visit,
    plan_epoch,
    share,
)
from qwen_lora.train.randomness import Purpose, noise, stratified_u
from qwen_lora.train.table import PlanTable
from qwen_lora.train.timesteps import TimestepSampling

if TYPE_CHECKING:
    from qwen_lora.shards.reader import ShardSet

KEPT_VISITS = 1_000_000  # of all plans in memory, about 60 bytes each; two are always kept


@dataclass(frozen=True)
class LoadedBatch:
    """One micro-batch of B samples of one bucket."""

    latents: torch.Tensor  # [B, C, h, w] float32, normalised
    noise: torch.Tensor  # [B, C, h, w] float32
    sigmas: torch.Tensor  # [B] float32, rounded to the compute dtype
    prompt_embeds: list[torch.Tensor]  # B times [T_i, D], in the compute dtype beside `tokens`
    prompt_masks: list[torch.Tensor]  # B times [T_i] bool
    sample_ids: list[str]
    tokens: FlowTokens | None = None  # of these latents, noise and sigmas, to train on

    @property
    def size(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> LoadedBatch:
        """On another device; without waiting when the batch is pinned. Masks and sigmas stay on the
        host: asking whether anything is padded, or for a noise level's row of a table, does not
        wait for the device. So do latents and noise where there are tokens of them."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, sigmas=self.sigmas)

    def pin_memory(self) -> LoadedBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LoadedBatch:
        embeds = [change(tensor) for tensor in self.prompt_embeds]
        changed = replace(self, sigmas=change(self.sigmas), prompt_embeds=embeds)
        if self.tokens is not None:
            return replace(changed, tokens=self.tokens.map(change))
        return replace(changed, latents=change(self.latents), noise=change(self.noise))


@dataclass(frozen=True)
class _Sample:
    """One visit, loaded."""

    sample_id: str
    latents: torch.Tensor  # [C, h, w] float32
    noise: torch.Tensor  # [C, h, w] float32
    u: float  # uniform number of its noise level
    prompt_embeds: torch.Tensor  # [T, D]
    prompt_mask: torch.Tensor  # [T] bool


_Job = tuple[int, int, list[MicroBatch | None]]  # epoch, step, this rank's micro-batches


class BatchLoader:
    """Loads the micro-batches of a plan from open shard sets.

    `threads` read and decode up to `read_ahead` micro-batches beyond the one in use; 0 reads in the
    calling thread. Neither changes what is loaded. `pin_memory` is for copies to a GPU. While it
    reads ahead, shards of remote sets are downloaded up to `download_ahead_bytes` before their use.
    With `tokens_for` a family, samples are noised for its transformer here, ahead of their step.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        table: PlanTable,
        rule: BatchRule,
        sampling: TimestepSampling,
        *,
        read_ahead: int = 4,
        threads: int = 2,
        pin_memory: bool = False,
        download_ahead_bytes: int = 0,
        tokens_for: Family | None = None,
    ) -> None:
        self._sets, self._table, self._rule, self._sampling = list(sets), table, rule, sampling
        self._read_ahead, self._threads, self._pin = read_ahead, max(1, threads), pin_memory
        self._unconditional = [shard_set.unconditional() for shard_set in sets]
        self._plans: dict[int, EpochPlan] = {}
        self._planning = threading.Lock()
        self._download_ahead_bytes = download_ahead_bytes
        self._family = tokens_for

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch. A few are kept: reading ahead may be several short epochs ahead."""
        with self._planning:  # a look-ahead asks too
            plan = self._plans.get(epoch)
            if plan is None:
                plan = self._plans[epoch] = plan_epoch(self._table, self._rule, epoch)
                while self._too_many_plans():
                    del self._plans[min(self._plans)]
            return plan

    def _too_many_plans(self) -> bool:
        count, visits = len(self._plans), sum(len(plan.row) for plan in self._plans.values())
        return count > self._read_ahead + 2 or (count > 2 and visits > KEPT_VISITS)

    def load(self, micro_batch: MicroBatch, epoch: int) -> LoadedBatch:
        """Read one micro-batch: a pure function of its arguments and the loader's settings.

        Raises ShardError or QwenLoraError that names the sample.
        """
        samples = [self._load_sample(visit, epoch) for visit in micro_batch.visits]
        _check_shapes(samples)
        latents = torch.stack([sample.latents for sample in samples])
        u = torch.tensor([sample.u for sample in samples], dtype=torch.float64)
        height, width = latents.shape[-2:]
        batch = LoadedBatch(
            latents=latents,
            noise=torch.stack([sample.noise for sample in samples]),
            sigmas=self._sampling.sigmas(u, (height, width)),
            prompt_embeds=[sample.prompt_embeds for sample in samples],
            prompt_masks=[sample.prompt_mask for sample in samples],
            sample_ids=[sample.sample_id for sample in samples],
        )
        if self._family is not None:
            tokens = FlowTokens.make(self._family, batch.latents, batch.noise, batch.sigmas)
            dtype = self._sampling.compute_dtype
            batch = replace(
                batch,
                tokens=replace(tokens, noised=tokens.noised.to(dtype)),
                prompt_embeds=[embeds.to(dtype) for embeds in batch.prompt_embeds],
            )
        return batch.pin_memory() if self._pin else batch

    def stream(
        self, epoch: int, first_step: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, list[LoadedBatch | None]]]:
        """The rest of one epoch: (step, this rank's micro-batches as `share` orders them).

        Errors of the reading threads are raised here, in order. Close the iterator (or exhaust it)
        to end its threads.
        """

        def jobs() -> Iterator[_Job]:
            return self._jobs(epoch, first_step, rank, world)

        for _, step, batches in self._prefetch(jobs):
            yield step, batches

    def stream_epochs(
        self, epoch: int, first_step: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, int, list[LoadedBatch | None]]]:
        """Like `stream`, without end: (epoch, step, micro-batches). Reading ahead crosses from one
        epoch into the next, which matters when epochs are short."""

        def jobs() -> Iterator[_Job]:
            now, first = epoch, first_step
            while True:
                yield from self._jobs(now, first, rank, world)
                now, first = now + 1, 0

        yield from self._prefetch(jobs)

    def _jobs(self, epoch: int, first_step: int, rank: int, world: int) -> Iterator[_Job]:
        plan = self.plan(epoch)
        for step in range(first_step, plan.steps):
            yield epoch, step, share(plan.step(step), rank, world)

    def _prefetch(
        self, jobs: Callable[[], Iterator[_Job]]
    ) -> Iterator[tuple[int, int, list[LoadedBatch | None]]]:
        """Load jobs in order, keeping at most `read_ahead` micro-batches waiting."""
        if self._read_ahead == 0:
            for epoch, step, work in jobs():
                yield epoch, step, [None if one is None else self.load(one, epoch) for one in work]
            return
        tasks = _tasks(jobs())
        waiting: deque[tuple[_Task, Future[LoadedBatch | None]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="qwen-lora-read")
        ahead = self._look_ahead(jobs())
        try:
            done: list[LoadedBatch | None] = []
            for number in count():
                for task in islice(tasks, self._read_ahead + 1 - len(waiting)):
                    waiting.append((task, pool.submit(self._load_task, task)))
                if not waiting:
                    return
                task, future = waiting.popleft()
                done.append(future.result())
                if ahead is not None:
                    ahead.advance(number)
                if task.last:
                    yield task.epoch, task.step, done
                    done = []
        finally:
            if ahead is not None:
                ahead.close()
            with ExitStack() as stack:
                for shard_set in self._sets:
                    stack.enter_context(shard_set.store.interrupted())
                pool.shutdown(wait=True, cancel_futures=True)

    def _look_ahead(self, jobs: Iterator[_Job]) -> LookAhead | None:
        """Downloads for the same jobs, when a set is remote."""
        remote = {
            index: shard_set.store
            for index, shard_set in enumerate(self._sets)
            if isinstance(shard_set.store, RemoteStore)
        }
        if not remote or not self._download_ahead_bytes:
            return None

        def files() -> Iterator[Iterator[RemoteFile]]:
            for task in _tasks(jobs):
                visits = task.micro_batch.visits if task.micro_batch is not None else ()
                rows = (visit.row for visit in visits)
                places = ((int(self._table.set_index[row]), row) for row in rows)
                yield (
                    (remote[index], self._sets[index].tar_of(int(self._table.set_row[row])))
                    for index, row in places
                    if index in remote
                )

        return LookAhead(files(), self._download_ahead_bytes)

    def _load_task(self, task: _Task) -> LoadedBatch | None:
        return None if task.micro_batch is None else self.load(task.micro_batch, task.epoch)

    def _load_sample(self, visit: Visit, epoch: int) -> _Sample:
        table, seed = self._table, self._rule.seed
        sample_id = table.sample_id(visit.row)
        try:
            tensors = self._read(visit)
        except Exception as error:
            if isinstance(error, QwenLoraError) and sample_id in str(error):
                raise
            kind = ShardError if isinstance(error, ShardError) else QwenLoraError
            raise kind(f"sample {sample_id}: {str(error) or type(error).__name__}") from error
        embeds, mask = tensors["prompt_embeds"], tensors["prompt_mask"]
        if "latents" in tensors:
            latents = tensors["latents"].float()  # [C, h, w], stored in float16
        else:
            mean, std = tensors["posterior_mean"].float(), tensors["posterior_std"].float()
            drawn = noise(seed, epoch, sample_id, visit.visit, tuple(mean.shape), Purpose.POSTERIOR)
            latents = mean + std * torch.from_numpy(drawn)
        drawn = noise(seed, epoch, sample_id, visit.visit, tuple(latents.shape))
        count = int(table.visits_before(seed, epoch, np.array([visit.row]))[0]) + visit.visit
        return _Sample(
            sample_id=sample_id,
            latents=latents,
            noise=torch.from_numpy(drawn),
            u=stratified_u(seed, sample_id, count),
            prompt_embeds=embeds,
            prompt_mask=mask,
        )

    def _read(self, visit: Visit) -> dict[str, torch.Tensor]:
        """The tensors of one record with the chosen caption's as `prompt_embeds`, `prompt_mask`."""
        index = int(self._table.set_index[visit.row])
        row = int(self._table.set_row[visit.row])
        if visit.caption == UNCONDITIONAL:
            tensors = dict(self._sets[index].read(row, captions=[]).tensors)
            tensors["prompt_embeds"], tensors["prompt_mask"] = self._unconditional[index]
            return tensors
        tensors = dict(self._sets[index].read(row, captions=[visit.caption]).tensors)
        for name in ("prompt_embeds", "prompt_mask"):
            tensors[name] = tensors.pop(f"{name}.{visit.caption}")
        return tensors


@dataclass(frozen=True)
class _Task:
    """One micro-batch of a rank; `last` ends its step."""

    epoch: int
    step: int
    micro_batch: MicroBatch | None
    last: bool


def _tasks(jobs: Iterator[_Job]) -> Iterator[_Task]:
    for epoch, step, work in jobs:
        for position, micro_batch in enumerate(work, 1):
            yield _Task(epoch, step, micro_batch, last=position == len(work))


def _check_shapes(samples: Sequence[_Sample]) -> None:
    first = samples[0]
    for sample in samples[1:]:
        if sample.latents.shape != first.latents.shape:
            raise ShardError(
                f"samples {first.sample_id} and {sample.sample_id} have one bucket, but latents "
                f"{tuple(first.latents.shape)} and {tuple(sample.latents.shape)}; "
                "run `qwen-lora shards verify --deep`"
            )
