# ruff: noqa: TID253
"""The processes of one run: who I am, what we agree on.

A failure on one rank must end all ranks with the same message instead of leaving the others waiting
in a collective. So everything that only rank 0 does goes through `on_main`, and errors that only
one rank sees (a damaged record) travel with the flags of `agree`. These small messages go through a
gloo group on the host: they never wait for a GPU. They are JSON; nothing is ever unpickled. What
happens in between (in the middle of a step, a killed process) is the lifeline's affair.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.lifeline import Lifeline, error_facts, error_from

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def start_ranks(settings: Settings, lifeline: Lifeline) -> Ranks:
    """Join the process group that the launcher described, on a GPU if there is one.

    accelerate's own mixed precision (autocast) stays off: the compute type is that of the weights.
    Raises InputError when `num_processes` is neither 1 nor the number of processes there are.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    _refuse_other_parallelism()
    with warnings.catch_warnings():
        # It chooses a number of CPU threads when nobody did, and warns on every rank.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", category=UserWarning)
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            # Explicit, because the environment could otherwise divide every loss once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(settings.report_to) or None,
            project_dir=settings.output_dir / settings.logging_dir,
        )
    ranks = Ranks(accelerator, lifeline)
    if settings.num_processes not in (1, ranks.world):
        ranks.close()
        raise InputError(
            f"num_processes is {settings.num_processes}, but {ranks.world} are running; start "
            "`qwen-lora train` with --num-processes, or use `accelerate launch` alone"
        )
    return ranks


def _refuse_other_parallelism() -> None:
    """What `accelerate config` may have put into the launcher's environment. Raises InputError."""
    for name in ("DeepSpeed", "FSDP", "Megatron_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            raise InputError(
                f"accelerate is configured for {name.replace('_', '-')}, which training a LoRA "
                "here does not use; start with --num-processes N, or run `accelerate launch "
                "--multi_gpu` without that configuration (shard_base spreads a base that is too "
                "large for one card)"
            )


# Rank 0 may hash or load for a long time while the others wait in a host collective. That it is
# alive is known from the lifeline.
HOST_TIMEOUT = timedelta(hours=2)


class Ranks:
    """One process's place among the others, and the host-side collectives between them."""

    def __init__(self, accelerator: Accelerator, lifeline: Lifeline | None = None) -> None:
        self.accelerator = accelerator
        self.lifeline = lifeline or Lifeline()
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.local_rank: int = accelerator.local_process_index  # on its machine
        self.device: torch.device = accelerator.device
        self._group: Any = None
        if self.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def leads_other_node(self) -> bool:
        """The first rank of a machine that rank 0 is not on."""
        return self.local_rank == 0 and not self.is_main

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0; every rank gets its JSON result, or raises its error."""
        if self.world == 1:
            return work()
        message: dict[str, Any] = {}
        failure: Exception | None = None
        if self.is_main:
            try:
                message = {"value": work()}
            except Exception as error:
                failure, message = error, {"error": error_facts(error, self.rank)}
        message = self._broadcast_json(message)
        if failure is not None:
            raise failure
        if "error" in message:
            raise error_from(message["error"])
        return message["value"]

    def once_per_node(self, work: Callable[[], Any]) -> None:
        """Run `work` on rank 0, then on the first rank of every other machine: what is fetched or
        made once is there for all processes, whether machines share a disk or not."""
        self.on_main(lambda: bool(work()))
        self.everywhere(lambda: work() if self.leads_other_node else None)

    def everywhere(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if one fails, all raise."""
        if self.world == 1:
            return work()
        failure: Exception | None = None
        try:
            value = work()
        except Exception as error:
            failure = error
        self.agree(failure)
        return value

    def agree(self, failure: Exception | None = None, flag: int = 0) -> int:
        """Exchange one flag: returns the largest over the ranks. If any rank brings a failure,
        every rank raises: its own, or that of the lowest failing rank."""
        if self.world == 1:
            if failure is not None:
                raise failure
            return flag
        state = torch.tensor([int(failure is not None), flag])
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group)
        failed, flag = state.tolist()
        if failed:
            all_facts = self.gather_json(error_facts(failure, self.rank) if failure else None)
            if failure is not None:
                raise failure
            raise error_from(next(facts for facts in all_facts if facts))
        return int(flag)

    def check_equal(self, value: str, what: str) -> None:
        """Raise on every rank when the ranks do not hold the same `value`."""
        if self.world > 1 and len(set(self.gather_json(value))) > 1:
            raise QwenLoraError(
                f"the processes disagree about {what}; do all machines have the same version and "
                "files?"
            )

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        sizes = [torch.zeros_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size, group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self._group)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def sum_on_host(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks of a CPU tensor; the input is left as it was."""
        total = values.clone()
        if self.world > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def close(self) -> None:
        """Leave the process group, so that a later run in this process can start one."""
        from accelerate.state import AcceleratorState

        if self.world > 1:
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's `data`, on every rank."""
        if self.world == 1:
            return data
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0, group=self._group)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.is_main and data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self._group)
        return buffer.numpy().tobytes()

    def _broadcast_json(self, value: Any) -> Any:
        return json.loads(self.broadcast(json.dumps(value).encode()))
