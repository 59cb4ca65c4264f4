"""The base spread over ranks with FSDP2: the numbers of whole bases, and a part of their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from qwen_lora.config.checks import check
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.qwen_image.scaled import quantize_rows
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
    "fp8": {"base_precision": "fp8"},
    "fp8, diffusers' forward": {"base_precision": "fp8", "own_forward": "false"},
    "fp8 products": {
        "base_precision": "fp8",
        "low_precision_products": "forward",
        "recompute": "selective",
        "mixed_precision": "bf16",
    },
    "int8 products, both": {
        "base_precision": "int8",
        "low_precision_products": "both",
        "lora_targets": "all-linear+mod",
        "offload_activations": "true",
    },
}
FAST = ("recomputed, all layers", "fp8")
PRODUCTS_OF_FEW = {"FEW_ROWS": 0}  # in 8 bits, of samples that have few tokens


def files(run: Path) -> dict[str, bytes]:
    """What training made: the LoRA, the checkpoints' tensors, the pictures."""
    found = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".png")]
    return {
        str(path.relative_to(run)): path.read_bytes() for path in found if path.name != "loss.png"
    }


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=() if way in FAST else pytest.mark.slow) for way in WAYS],
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
        argv += ["--set", f"shard_base={shard_base}"]
        settled(place.run(argv, constants=PRODUCTS_OF_FEW))
    whole, spread = place.folder / "whole", place.folder / "spread"
    assert curve(spread) == curve(whole) and len(curve(whole)) == 6
    assert files(spread) == files(whole) and len(files(whole)) == 1 + 2 * 2 + 2 * 3


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("bf16", marks=pytest.mark.slow),
        "fp8",
        pytest.param("int8", marks=pytest.mark.slow),
    ],
)
def test_one_rank_and_a_resume_from_it(
    precision: str, shards: Path, transformer_only: Path, machines: Callable[..., Machines]
) -> None:
    """One rank's 6 steps, and 3 of one rank followed by 3 of two with a spread base."""
    one, two = machines("one", 1), machines("two", 2)

    def argv(name: str, accumulation: int, steps: int) -> list[str]:
        changes = {
            "base_precision": precision,
            "gradient_accumulation_steps": accumulation,
            "max_train_steps": steps,
        }
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
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_rows_that_three_ranks_cannot_share_evenly(
    precision: str, shards: Path, transformer_only: Path, machines: Callable[..., Machines]
) -> None:
    place = machines("three", 3)
    results = []
    for shard_base in ("none", "all"):
        changes = {"base_precision": precision, "low_precision_products": "both"}
        if precision == "bf16":
            del changes["low_precision_products"]
        argv = train_argv(
            shards, transformer_only, place.folder / shard_base, max_train_steps=2, **changes
        )
        settled(place.run([*argv, "--set", f"shard_base={shard_base}"], constants=PRODUCTS_OF_FEW))
        results.append((place.folder / shard_base / "lora.safetensors").read_bytes())
    assert results[0] == results[1]


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


# ---- what is held, in this process: a rank of a group whose other ranks do not exist -------------


@pytest.fixture
def as_rank() -> Iterator[Callable[..., Any]]:
    """A mesh of so many of which this process is one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank: int, world: int = 2) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        return init_device_mesh("cpu", (world,), mesh_dim_names=(FSDP,))

    yield start
    dist.destroy_process_group()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def in_fp8(folder: Path, file: Path) -> Path:
    """The transformer of a model as one file that holds the blocks' matrices in fp8."""
    (path,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(path)
    for name, tensor in list(weights.items()):
        if tensor.ndim == 2 and name.startswith("transformer_blocks."):
            weights[name], scale = quantize_rows(tensor, torch.float8_e4m3fn)
            layer = name.removesuffix(".weight")
            weights[f"{layer}.weight_scale"] = scale[:, None]
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            weights[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
    save_file(weights, file)
    return file


@pytest.mark.parametrize(
    ("precision", "products", "single_file"),
    [
        ("bf16", "none", False),
        ("fp8", "none", False),
        ("int8", "both", False),
        ("fp8", "both", True),
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_reads_and_holds_its_part(
    world: int,
    precision: str,
    products: str,
    single_file: bool,
    transformer_only: Path,
    tmp_path: Path,
    as_rank: Callable[..., Any],
) -> None:
    """Of the weights and of their scales; together they are the whole ones, to the bit."""
    file = in_fp8(transformer_only, tmp_path / "one.safetensors") if single_file else None
    model = resolve_model(str(transformer_only), ("transformer",), transformer_file=file)
    how = {"base_precision": precision, "low_precision_products": products}
    load = partial(
        model.family.load_transformer, model, device=torch.device("cpu"), dtype=torch.float32, **how
    )
    loaded = load()
    whole = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    parts: list[dict[str, torch.Tensor]] = []
    for rank in range(world):
        spread = load(mesh=as_rank(rank, world))
        local = {
            name: p.to_local() if hasattr(p, "to_local") else p
            for name, p in spread.named_parameters()
        }
        parts.append({name: p.detach().clone() for name, p in local.items()})
        # The first rank's part is the largest: torch pads the others to its size.
        for name, p in local.items():
            if "transformer_blocks" in name:
                assert p.untyped_storage().nbytes() == parts[0][name].nbytes, name
    scales = {name for name in whole if ".scale" in name}
    assert bool(scales) == (precision != "bf16") and scales <= parts[0].keys()
    held = [sum(p.nbytes for n, p in part.items() if "transformer_blocks" in n) for part in parts]
    of_blocks = sum(p.nbytes for name, p in whole.items() if "transformer_blocks" in name)
    assert sum(held) == of_blocks and max(held) - min(held) < 0.05 * of_blocks
    print(f"{precision}, blocks: {of_blocks:,} bytes whole, on {world} ranks {held}")
    if world == 2:
        # What `plan` and `recompute: auto` count: this part, and the gathered blocks' weights.
        settings = Settings(shard_base="all", **how)
        predicted = StepModel(model, settings, torch.float32, parts=2).weight_bytes
        assert predicted == sum(p.nbytes for p in parts[0].values()) + of_blocks
    for name in parts[0]:
        found = [part[name] for part in parts]
        assert all(part.dtype == whole[name].dtype for part in found), name
        if "transformer_blocks" in name:
            assert torch.equal(torch.cat([as_bytes(p) for p in found]), as_bytes(whole[name])), name
        else:
            assert all(torch.equal(part, whole[name]) for part in found), name


@pytest.mark.parametrize(
    ("recompute", "precision"), [("none", "bf16"), ("full", "bf16"), ("full", "int8")]
)
def test_one_block_at_a_time_is_gathered(
    recompute: str, precision: str, transformer_only: Path, as_rank: Callable[..., Any]
) -> None:
    """Forward and backward; the first block, whose input needs no gradient, stays to the end."""
    from torch.distributed.tensor import DTensor

    model = resolve_model(str(transformer_only), ("transformer",))
    cpu = torch.device("cpu")
    transformer: Any = model.family.load_transformer(
        model, device=cpu, dtype=torch.float32, base_precision=precision, mesh=as_rank(0)
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


def test_weights_in_4_bits_are_not_spread() -> None:
    keys = frozenset({"shard_base", "base_precision"})
    for precision in ("bf16", "fp8", "int8"):
        assert not check("train", Settings(shard_base="all", base_precision=precision), keys)
    (finding,) = check("train", Settings(shard_base="all", base_precision="nf4"), keys)
    assert "cannot spread weights held as nf4" in finding.text and not finding.is_note
