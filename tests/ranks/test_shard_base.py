"""The base spread over ranks with FSDP2: the numbers of whole bases, and a part of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen_lora.config.checks import check
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.models import resolve_model
from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.cost.step import StepModel
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.sharding import FSDP, base_mesh
from tests.ranks.machines import Machines, curve, distance, settled, train_argv

pytestmark = pytest.mark.multiprocess
WAYS: dict[str, dict[str, Any]] = {
    "kept activations": {"gradient_checkpointing": "false"},
    "recomputed, all layers": {"lora_targets": "all-linear+mod"},
    "diffusers' forward": {"own_forward": "false"},
    "activations in host memory": {"offload_activations": "true"},
    "table and dropout": {"mixed_precision": "bf16", "lora_dropout": 0.1},
}


def files(run: Path) -> dict[str, bytes]:
    """What training made: the LoRA, the checkpoints' tensors, the pictures."""
    found = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".png")]
    return {
        str(path.relative_to(run)): path.read_bytes() for path in found if path.name != "loss.png"
    }


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way == "recomputed, all layers" else pytest.mark.slow)
        for way in WAYS
    ],
)
def test_a_base_spread_over_two_ranks_gives_the_bytes_of_whole_ones(
    way: str, shards: Path, transformer_only: Path, machines: Callable[..., Machines]
) -> None:
    """Validation and pictures included, in which a rank is without work of its own at the end."""
    changes = {
        **WAYS[way],
        "validation_steps": 3,
        "validation_max_images": 3,
        "preview_steps": 6,
        "preview_inference_steps": 2,
    }
    place = machines("two", 2)
    for name, shard_base in (("whole", "none"), ("spread", "all")):
        argv = train_argv(shards, transformer_only, place.folder / name, **changes)
        settled(place.run([*argv, "--set", f"shard_base={shard_base}"]))
    whole, spread = place.folder / "whole", place.folder / "spread"
    assert curve(spread) == curve(whole) and len(curve(whole)) == 6
    assert files(spread) == files(whole) and len(files(whole)) == 1 + 2 * 2 + 2 * 3


def test_one_rank_and_a_resume_from_it(
    shards: Path, transformer_only: Path, machines: Callable[..., Machines]
) -> None:
    """One rank's 6 steps, and 3 of one rank followed by 3 of two with a spread base."""
    one, two = machines("one", 1), machines("two", 2)

    def argv(name: str, accumulation: int, steps: int) -> list[str]:
        changes = {"gradient_accumulation_steps": accumulation, "max_train_steps": steps}
        return train_argv(shards, transformer_only, one.folder / name, **changes)

    settled(one.run(argv("unbroken", 2, 6)))
    settled(one.run(argv("broken", 2, 3)))
    resumed = settled(two.run([*argv("broken", 2, 6), "--set", "shard_base=all"]))
    assert "continuing at step 3" in resumed.logs[0]
    settled(two.run([*argv("spread", 1, 6), "--set", "shard_base=all"]))
    unbroken = one.folder / "unbroken"
    for name in ("broken", "spread"):
        run = one.folder / name
        assert distance(run / "lora.safetensors", unbroken / "lora.safetensors") < 1e-5
        for (_, loss, norm), (_, other, other_norm) in zip(
            curve(run), curve(unbroken), strict=True
        ):
            assert (loss, norm) == pytest.approx((other, other_norm), rel=1e-5)
        assert CheckpointStore(run).steps() == [3, 6]


@pytest.mark.slow
def test_the_base_of_each_machine(
    shards: Path, transformer_only: Path, machines: Callable[..., Machines]
) -> None:
    """Two machines of two: node spreads it over two ranks, all over four, both with one result."""
    place = machines("four", 2, 2)
    results = []
    for shard_base in ("none", "node", "all"):
        argv = train_argv(shards, transformer_only, place.folder / shard_base, max_train_steps=2)
        settled(place.run([*argv, "--set", f"shard_base={shard_base}"]))
        results.append((place.folder / shard_base / "lora.safetensors").read_bytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([0, 1, 0], "the same number of processes on every machine"),
        ([0, 0, 1, 1], "the same number of processes on every machine"),
        ([0, 0], "each has only one here"),
    ],
)
def test_machines_that_cannot_hold_one_base_each_are_refused(places: list[int], said: str) -> None:
    ranks: Any = SimpleNamespace(
        world=len(places), local_rank=0, device=torch.device("cpu"), gather_json=lambda _: places
    )
    with pytest.raises(InputError, match=said):
        base_mesh(ranks, Settings(shard_base="node"))


# ---- what is held, in this process: rank 0 or 1 of a group whose other ranks do not exist --------


@pytest.fixture
def as_rank() -> Iterator[Callable[[int], Any]]:
    """A mesh of two of which this process is one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank: int) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        return init_device_mesh("cpu", (2,), mesh_dim_names=(FSDP,))

    yield start
    dist.destroy_process_group()


def test_each_rank_reads_and_holds_its_part(
    transformer_only: Path, as_rank: Callable[[int], Any]
) -> None:
    model = resolve_model(str(transformer_only), ("transformer",))
    load = model.family.load_transformer
    cpu = torch.device("cpu")
    whole = dict(load(model, device=cpu, dtype=torch.float32).named_parameters())
    parts: list[dict[str, torch.Tensor]] = []
    for rank in (0, 1):
        mesh = as_rank(rank)
        spread = load(model, device=cpu, dtype=torch.float32, mesh=mesh)
        local = {
            name: p.to_local() if hasattr(p, "to_local") else p
            for name, p in spread.named_parameters()
        }
        blocks = [p for name, p in local.items() if "transformer_blocks" in name]
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in blocks)
        parts.append({name: p.detach().clone() for name, p in local.items()})
    held = [sum(p.nbytes for n, p in part.items() if "transformer_blocks" in n) for part in parts]
    of_blocks = sum(p.nbytes for name, p in whole.items() if "transformer_blocks" in name)
    assert sum(held) == of_blocks and abs(held[0] - held[1]) < 0.01 * of_blocks
    # What `plan` and `recompute: auto` count: this part, and the weights of the gathered blocks.
    predicted = StepModel(model, Settings(shard_base="all"), torch.float32, parts=2).weight_bytes
    assert predicted == sum(p.nbytes for p in parts[0].values()) + of_blocks
    print(f"blocks: {of_blocks:,} bytes whole, {held[0]:,} and {held[1]:,} on two ranks")
    for name, full in whole.items():
        if "transformer_blocks" in name:
            assert torch.equal(torch.cat([part[name] for part in parts]), full), name
        else:
            assert torch.equal(parts[0][name], full) and torch.equal(parts[1][name], full), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_block_at_a_time_is_gathered(
    recompute: str, transformer_only: Path, as_rank: Callable[[int], Any]
) -> None:
    """Forward and backward; the first block, whose input needs no gradient, stays to the end."""
    from torch.distributed.tensor import DTensor

    model = resolve_model(str(transformer_only), ("transformer",))
    cpu = torch.device("cpu")
    transformer: Any = model.family.load_transformer(
        model, device=cpu, dtype=torch.float32, mesh=as_rank(0)
    )
    add_lora(transformer, LoraSpec.from_settings(Settings(rank=2)), model.family, 0)
    how = ForwardOptions(recompute=Recompute.parse(recompute))
    model.family.prepare_training(transformer, how)
    blocks = transformer.transformer_blocks

    def gathered() -> list[int]:
        return [
            index
            for index, block in enumerate(blocks)
            if not isinstance(block.attn.to_q.base_layer.weight, DTensor)
        ]

    seen: list[list[int]] = []
    for block in blocks:
        block.attn.norm_q.register_forward_hook(lambda *_: seen.append(gathered()))
    velocity = model.family.velocity(
        transformer,
        torch.randn(1, 16, 4, 4),
        torch.tensor([0.5]),
        [torch.randn(3, transformer.config.joint_attention_dim)],
        [torch.ones(3, dtype=torch.bool)],
    )
    assert seen == [[0], [1]] and gathered() == []
    seen.clear()
    velocity.sum().backward()
    assert gathered() == []
    # torch asks for the next block's weights, which is the one before it, while one computes.
    assert seen == ([] if recompute == "none" else [[1], [0]])


def test_weights_in_few_bits_are_not_spread() -> None:
    settings = Settings(shard_base="all", base_precision="nf4")
    (finding,) = check("train", settings, frozenset({"shard_base", "base_precision"}))
    assert "cannot spread weights held as nf4" in finding.text and not finding.is_note
