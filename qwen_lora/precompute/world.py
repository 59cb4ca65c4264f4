"""The processes of one stage 1 run: rank 0 plans and publishes, all encode.

They talk through torch.distributed's key-value store, in JSON. No collective ever blocks: whoever
waits also looks for another rank's failure, so one failing rank stops all with its message.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_lora.errors import InputError, QwenLoraError, Stopped
from qwen_lora.hashing import canonical_json

CHUNK_BYTES = 1 << 20  # the store caps one value at 8 MiB
POLL_S = 0.05
FAREWELL_S = 30.0  # how long rank 0 keeps the store open for the others to hear of a failure
FAILED = "failed"


class World:
    """Rank, size and the two exchanges that stage 1 needs: `share` and `gather`."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._round = 0

    @classmethod
    def from_environment(cls) -> World:
        """One process, or what `accelerate launch` or torchrun put into the environment."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size <= 1 or "RANK" not in os.environ:
            return cls()
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(iter(rendezvous("env://")))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(rank, size, local_rank, PrefixStore("qwen-lora", store))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """Rank 0's JSON value, on every rank."""
        self._round += 1
        if self._store is None:
            return value
        key = f"share-{self._round}"
        if self.first:
            self._put(key, value)
            return value
        return self._take(key)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value in rank order on rank 0; an empty list elsewhere."""
        self._round += 1
        if self._store is None:
            return [value]
        if not self.first:
            self._put(f"gather-{self._round}-{self.rank}", value)
            return []
        others = range(1, self.size)
        return [value, *(self._take(f"gather-{self._round}-{rank}") for rank in others)]

    def check(self) -> None:
        """Raise what another rank failed with. Called between batches; costs one round trip."""
        if self._store is None:
            return
        try:
            failed = self._store.check([FAILED])
        except RuntimeError:  # the store died with rank 0
            raise QwenLoraError(
                "process 0 ended before its time; its own message says why"
            ) from None
        if failed:
            raise _from_json(json.loads(self._store.get(FAILED)))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An error inside the block stops every rank with the same message."""
        try:
            yield
        except BaseException as error:
            if self._store is not None:
                self._farewell(error)
            raise

    def _farewell(self, error: BaseException) -> None:
        try:
            if not self._store.check([FAILED]):
                self._store.set(FAILED, canonical_json(_to_json(error, self.rank)))
            self._store.set(f"heard-{self.rank}", b"1")
            until = time.monotonic() + FAREWELL_S
            others = [f"heard-{rank}" for rank in range(1, self.size)]
            while self.first and time.monotonic() < until and not self._store.check(others):
                time.sleep(POLL_S)
        except RuntimeError:
            pass  # the store is gone: the others hear it from that

    def _put(self, key: str, value: Any) -> None:
        data = canonical_json(value)
        chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        for number, chunk in enumerate(chunks):
            self._store.set(f"{key}/{number}", chunk)
        self._store.set(key, str(len(chunks)))

    def _take(self, key: str) -> Any:
        while True:
            self.check()
            if self._store.check([key]):
                break
            time.sleep(POLL_S)
        chunks = int(self._store.get(key))
        return json.loads(b"".join(self._store.get(f"{key}/{number}") for number in range(chunks)))


def _to_json(error: BaseException, rank: int) -> dict[str, Any]:
    if isinstance(error, Stopped):
        return {"kind": "stopped", "message": str(error), "signum": int(error.signum)}
    if isinstance(error, QwenLoraError):
        kind = "input" if isinstance(error, InputError) else "error"
        return {"kind": kind, "message": str(error)}
    return {"kind": "error", "message": f"process {rank}: {type(error).__name__}: {error}"}


def _from_json(facts: dict[str, Any]) -> QwenLoraError:
    if facts["kind"] == "stopped":
        return Stopped(facts["signum"], facts["message"])
    return (InputError if facts["kind"] == "input" else QwenLoraError)(facts["message"])
