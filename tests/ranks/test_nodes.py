"""Machines that share no disk: each has its own folders, caches and copy of the shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_lora.train.checkpoint import CheckpointStore
from qwen_lora.train.ranks import Ranks
from tests.ranks.machines import Machines, curve, settled, train_argv

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def two_nodes(machines: Callable[..., Machines], shards: Path, transformer_only: Path) -> Machines:
    """Two machines of one process, each with copies of shards and model in its own folder."""
    place = machines("two", 1, 1)
    for node in (0, 1):
        shutil.copytree(shards, place.of(node) / "shards")
        shutil.copytree(transformer_only, place.of(node) / "model")
    return place


def spoil_weights(model: Path) -> None:
    (file,) = model.glob("transformer/*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    save_file(tensors, file)


def test_a_run_on_two_machines_is_that_of_one(
    two_nodes: Machines, machines: Callable[..., Machines]
) -> None:
    """Relative names, so everything is in each machine's folder; begun on both, resumed on both,
    with a modulation table. Only the first machine has the run."""

    def argv(steps: int, accumulation: int = 1) -> list[str]:
        more = {"gradient_accumulation_steps": accumulation, "mixed_precision": "bf16"}
        return train_argv("shards", "model", "run", max_train_steps=steps, **more)

    settled(two_nodes.run(argv(3)))
    resumed = settled(two_nodes.run(argv(6)))
    assert "continuing at step 3" in resumed.logs[0] and resumed.logs[1] == ""
    assert not (two_nodes.of(1) / "run").exists()
    tables = [list((two_nodes.of(node) / "cache" / "modulation").iterdir()) for node in (0, 1)]
    assert [len(found) for found in tables] == [1, 1]
    assert tables[0][0].read_bytes() == tables[1][0].read_bytes()

    same = machines("same", 2)  # two processes of one machine
    shutil.copytree(two_nodes.of(0) / "shards", same.of(0) / "shards")
    shutil.copytree(two_nodes.of(0) / "model", same.of(0) / "model")
    settled(same.run(argv(6)))
    two, one = two_nodes.of(0) / "run", same.of(0) / "run"
    assert (two / "lora.safetensors").read_bytes() == (one / "lora.safetensors").read_bytes()
    assert curve(two) == curve(one)
    assert CheckpointStore(two).steps() == [3, 6]


@pytest.mark.parametrize(("rank", "local_rank", "works"), [(0, 0, 1), (1, 1, 0), (2, 0, 1)])
def test_once_per_node(rank: int, local_rank: int, works: int) -> None:
    """Rank 0 before the others, of whom the first of each machine has it to do."""
    done: list[str] = []
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.local_rank = rank, local_rank
    ranks.on_main = lambda work: done.append("main") or (work() if rank == 0 else None)  # type: ignore[method-assign, func-returns-value]
    ranks.everywhere = lambda work: done.append("all") or work()  # type: ignore[method-assign, func-returns-value]
    ranks.once_per_node(lambda: done.append("work"))
    assert done.count("work") == works
    assert done.index("main") < done.index("all")


def in_hub_cache(model: Path, hub: Path) -> None:
    """As huggingface_hub leaves a downloaded model `owner/tiny`."""
    folder, commit = hub / "hub" / "models--owner--tiny", "0" * 40
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def test_each_machine_finds_the_model_in_its_own_hub_cache(
    two_nodes: Machines, transformer_only: Path
) -> None:
    for node in (0, 1):
        in_hub_cache(transformer_only, two_nodes.of(node) / "hub")
    argv = train_argv("shards", "owner/tiny", "run", max_train_steps=1)
    settled(two_nodes.run(argv))
    shutil.rmtree(two_nodes.of(1) / "hub")
    run = two_nodes.run([*argv, "--restart"])
    assert run.codes == [2, 2], run
    assert all("owner/tiny" in lines[0] for lines in run.errors)


def test_another_base_model_on_a_machine_is_refused(two_nodes: Machines) -> None:
    spoil_weights(two_nodes.of(1) / "model")
    run = two_nodes.run(train_argv("shards", "model", "run"))
    assert run.codes == [2, 2], run
    for lines in run.errors:
        assert len(lines) == 1 and "the base model of process 1" in lines[0], run


def test_without_its_number_on_the_machine_a_process_does_not_begin(two_nodes: Machines) -> None:
    run = two_nodes.run(train_argv("shards", "model", "run"), without=("LOCAL_RANK",))
    assert run.codes == [2, 2] and "LOCAL_RANK=$SLURM_LOCALID" in run.logs[1], run


# ---- stage 1 -------------------------------------------------------------------------------------


def precompute_argv(model: object, output: object) -> list[str]:
    values = {"shard_max_samples": 2, "vae_batch_size": 2, "encode_threads": 1}
    argv = ["precompute", "images", "--output", str(output), "--model", str(model)]
    argv += ["--resolution", "96"]
    return argv + [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def encoding_nodes(
    machines: Callable[..., Machines], tiny_model: Path, image_folder: Path
) -> Callable[..., Machines]:
    def make(name: str, *processes: int) -> Machines:
        place = machines(name, *processes)
        for node in range(len(processes)):
            shutil.copytree(image_folder, place.of(node) / "images")
            shutil.copytree(tiny_model, place.of(node) / "model")
        return place

    return make


def test_machines_write_the_set_of_one_process(
    encoding_nodes: Callable[..., Machines], tmp_path: Path
) -> None:
    """Into a folder that both see; dataset, model and caches are each machine's own."""
    settled(encoding_nodes("one", 1).run(precompute_argv("model", tmp_path / "alone")))
    two = encoding_nodes("two", 1, 2)
    run = settled(two.run(precompute_argv("model", tmp_path / "together")))
    assert visible(tmp_path / "together") == visible(tmp_path / "alone")
    assert "12 samples" in run.logs[0]
    assert not list((tmp_path / "together" / ".local").glob("*.tmp"))
    assert not (two.of(1) / "shards").exists()


def test_what_machines_must_share_is_asked_before_the_work(
    encoding_nodes: Callable[..., Machines], tmp_path: Path
) -> None:
    two = encoding_nodes("two", 1, 1)
    apart = two.run(precompute_argv("model", "shards"), constants={"SEEN_S": 0.5})
    assert apart.codes == [2, 2], apart
    assert "does not see the folder shards that process 0 writes to" in apart.errors[0][0]
    assert not (two.of(0) / "shards" / "manifest.json").exists()

    other = {1: ["--set", "text_batch_size=1"]}
    settings = two.run(precompute_argv("model", tmp_path / "set"), of_node=other)
    assert settings.codes == [2, 2], settings
    assert "text_batch_size is 16 in process 0 and 1 in process 1" in settings.errors[1][0]

    shutil.rmtree(two.of(1) / "images")
    dataset = two.run(precompute_argv("model", tmp_path / "set"))
    assert dataset.codes == [2, 2] and "dataset images does not exist" in dataset.errors[0][0]


def test_another_encoder_on_a_machine_is_refused(
    encoding_nodes: Callable[..., Machines], tmp_path: Path
) -> None:
    two = encoding_nodes("two", 1, 1)
    (file,) = (two.of(1) / "model" / "vae").glob("*.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    run = two.run(precompute_argv("model", tmp_path / "set"))
    assert run.codes == [2, 2], run
    assert "the VAE of process 1 on" in run.errors[0][0]
    assert not (tmp_path / "set" / "manifest.json").exists()
