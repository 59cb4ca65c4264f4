"""The process that ranks are forked from, and the data that they train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.rank_runs import RankServer
from tests.ranks.machines import Machines
from tests.train.random_sets import random_map, random_prompts, random_set


@pytest.fixture
def machines(rank_server: RankServer, tmp_path: Path) -> Callable[..., Machines]:
    """Makes machines with so many processes each, in a folder of the test's."""

    def make(name: str, *processes: int) -> Machines:
        return Machines(rank_server, tmp_path / name, processes)

    return make


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 samples in two buckets, three preview prompts; tests must not change it."""
    prompts = random_prompts(["one", "two", "three"])
    folder = tmp_path_factory.mktemp("ranks") / "shards"
    return random_set(folder, 9, rgb=random_map(), prompts=prompts)
