"""AdamW over a LoRA's tensors as one, on several processes: each may do so or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rank_runs import Ranks, RankServer

from tests.faults.test_rank_faults import result
from tests.train.random_sets import random_set

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch"),
]
APART = "parameters apart"


@pytest.mark.parametrize(
    "settings",
    [{"max_grad_norm": 0.01}, pytest.param({"max_grad_norm": 0}, marks=pytest.mark.slow)],
    ids=["clipped", "not clipped"],
)
def test_ranks_end_with_the_same_bytes(
    rank_server: RankServer, transformer_only: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """20 steps with accumulation, all tensors apart on both; together on both; and begun apart on
    rank 1, then on rank 0 after a resume."""
    shards = random_set(tmp_path / "shards", 13, per_shard=2)
    settings = {**settings, "max_train_steps": 20, "checkpointing_steps": 4}

    def ranks_in(name: str) -> Ranks:
        (tmp_path / name).mkdir()
        return Ranks(rank_server, tmp_path / name, shards, transformer_only, 2)

    def run(ranks: Ranks, fault: str = "none", rank: int = 0, **more: Any) -> None:
        end = ranks.train(fault, rank, settings={**settings, **more.pop("steps", {})}, **more)
        assert end.codes == [0, 0], end

    apart, together, mixed = map(ranks_in, ("apart", "together", "mixed"))
    run(apart, APART, elsewhere=APART)
    run(together)
    run(mixed, APART, 1, steps={"max_train_steps": 8})
    run(mixed, APART, 0)
    expected = result(apart.output, 20)
    assert result(together.output, 20) == expected
    assert result(mixed.output, 20) == expected
