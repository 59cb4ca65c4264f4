"""The processes of one stage 1 run: rank 0 plans and publishes, all encode.

They talk through torch.distributed's key-value store, in JSON. No collective ever blocks: whoever
waits also looks at the lifeline, so one failing rank stops all with its message.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from qwen_lora.hashing import canonical_json
from qwen_lora.lifeline import Lifeline, join_processes

CHUNK_BYTES = 1 << 20  # the store caps one value at 8 MiB
POLL_S = 0.05


class World:
    """Rank, size and the two exchanges that stage 1 needs: `share` and `gather`."""

    def __init__(self, lifeline: Lifeline, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = lifeline.rank, lifeline.size, local_rank
        self.lifeline = lifeline
        self._store: Any = lifeline.store
        self._round = 0

    @classmethod
    def from_environment(cls) -> World:
        """One process, or what `accelerate launch` or torchrun put into the environment."""
        lifeline = join_processes()
        return cls(lifeline, int(os.environ.get("LOCAL_RANK", "0")) if lifeline.size > 1 else 0)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def leads_other_node(self) -> bool:
        """The first process of a machine that rank 0 is not on."""
        return self.local_rank == 0 and not self.first

    def meet(self) -> None:
        """Nobody goes on before all are here."""
        self.gather(None)
        self.share()

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
        """Raise what another rank failed with. Called between batches; costs nothing."""
        self.lifeline.check()

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
