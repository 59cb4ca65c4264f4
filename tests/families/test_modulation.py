"""The table of modulation against the layers that it replaces."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.families.base import ForwardOptions
from qwen_lora.families.qwen_image.modulation import LAYERS, ModulationTable, bf16_levels
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.train import transformer as base
from qwen_lora.train.timesteps import TimestepSampling
from tests.train.lora_model import CPU, lora_model, predict, shake

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return resolve_model(str(tiny_model), ("transformer", "scheduler"))


@pytest.fixture(scope="module")
def table(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.safetensors"
    path.touch()
    model.family.make_modulation_table(model, path, device=CPU, dtype=BF16)
    return path


def load(model: ModelFolder, table: Path | None, **more: Any) -> Any:
    transformer = model.family.load_transformer(
        model, device=CPU, dtype=BF16, modulation_table=table, **more
    )
    model.family.prepare_training(transformer, ForwardOptions())
    return transformer


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in bfloat16 numbers."""
    bits = [x.view(torch.int16).int() for x in (a, b)]
    order = [torch.where(x < 0, -(x & 0x7FFF), x) for x in bits]
    return int((order[0] - order[1]).abs().max())


def test_levels_are_all_that_training_can_draw() -> None:
    levels = set(bf16_levels().tolist())
    assert len(levels) == 1282 and min(levels) == 0.0 and max(levels) == 1.0
    u = torch.cat([torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1], torch.tensor([0.0])])
    for density in ("none", "logit_normal", "mode"):
        sampling = TimestepSampling(density=density, compute_dtype=BF16)  # type: ignore[arg-type]
        assert set(sampling.sigmas(u, (8, 8)).tolist()) <= levels


@torch.no_grad()
def test_rows_are_what_the_layers_give(model: ModelFolder, table: Path) -> None:
    live = load(model, None)
    sigmas = bf16_levels()[[1, 200, 640, 1000, 1281]]
    rows = ModulationTable(table).look_up(sigmas, CPU)  # [5, L, 2, 6 D]
    for index, sigma in enumerate(sigmas):
        time = live.time_text_embed(sigma[None].to(BF16), torch.empty(0, dtype=BF16))
        for number, block in enumerate(live.transformer_blocks):
            for stream, name in enumerate(LAYERS):
                expected = block.get_submodule(name)(F.silu(time))[0]
                assert ulps(rows[index, number, stream], expected) <= 1


@torch.no_grad()
def test_predictions_are_the_same(model: ModelFolder, table: Path) -> None:
    live, tabled = load(model, None), load(model, table)
    expected, found = predict(model, live), predict(model, tabled)
    assert (found - expected).norm() / expected.norm() < 4e-3  # half of bf16's step
    exact = model.family.load_transformer(model, device=CPU, dtype=torch.float32)
    reference = predict(model, exact)
    error, its = ((x - reference).norm() for x in (found, expected))
    assert error < 1.2 * its, "as near to float32 as without the table"


def test_a_third_of_the_weights_is_not_loaded(model: ModelFolder, table: Path) -> None:
    live, tabled = load(model, None), load(model, table)

    def held(transformer: Any) -> dict[str, int]:
        tensors = [*transformer.named_parameters(), *transformer.named_buffers()]
        return {name: tensor.nbytes for name, tensor in tensors}

    gone = sum(size for name, size in held(live).items() if "_mod.1." in name)
    assert sum(held(tabled).values()) == sum(held(live).values()) - gone
    blocks = live.transformer_blocks[0]
    share = sum(p.numel() for name, p in blocks.named_parameters() if "_mod.1." in name)
    assert share / sum(p.numel() for p in blocks.parameters()) == pytest.approx(1 / 3, abs=0.01)


def test_a_lora_on_the_modulation_trains(tiny_model: Path, table: Path) -> None:
    """Base from the table, the LoRA live: the gradients are those without the table."""
    settings = {"lora_targets": "all-linear+mod", "mixed_precision": "bf16"}
    gradients = []
    for path in (None, table):
        made = lora_model(tiny_model, table=path, **settings)
        shake(made, size=0.03)
        made.model.family.prepare_training(made.transformer, ForwardOptions())
        made.predict().square().mean().backward()
        gradients.append({name: p.grad for name, p in made.parameters})
    live, tabled = gradients
    assert live.keys() == tabled.keys() and any("img_mod" in name for name in live)
    for name, expected in live.items():
        found = tabled[name]
        assert expected is not None and found is not None
        assert (found - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_quantised_base_with_a_table(model: ModelFolder, table: Path, kind: str) -> None:
    """The table holds what the unquantised layers give."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    transformer = load(model, table, base_precision=kind)
    exact = predict(model, model.family.load_transformer(model, device=CPU, dtype=torch.float32))
    with torch.no_grad():
        assert (predict(model, transformer) - exact).norm() / exact.norm() < 0.25
    assert not any("_mod.1" in name for name, _ in transformer.named_parameters())


def test_damage_is_found_at_first_use(table: Path, tmp_path: Path) -> None:
    data = bytearray(table.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    begin = json.loads(data[8 : 8 + header])["rows"]["data_offsets"][0] + 8 + header
    data[begin + 3] ^= 1  # the row of level 0
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    opened = ModulationTable(damaged)
    assert len(opened.look_up(torch.tensor([0.5]), CPU)) == 1
    with pytest.raises(QwenLoraError, match="damaged; delete it, and it is made again"):
        opened.look_up(torch.tensor([0.0]), CPU)
    for length in (0, 7, header // 2, len(data) - 1):
        damaged.write_bytes(data[:length])
        with pytest.raises(QwenLoraError, match="damaged; delete it"):
            ModulationTable(damaged)


def test_a_level_that_is_not_there(table: Path) -> None:
    with pytest.raises(QwenLoraError, match=r"noise level 0.3\d* is not in the table"):
        ModulationTable(table).look_up(torch.tensor([0.3]), CPU)


def test_other_types_are_refused(model: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for bfloat16, not for torch.float32"):
        model.family.make_modulation_table(model, tmp_path / "t", device=CPU, dtype=torch.float32)


def test_safetensors_reads_the_file(table: Path) -> None:
    with safe_open(str(table), framework="pt") as file:
        assert sorted(file.keys()) == ["levels", "rows"]
        assert torch.equal(file.get_tensor("levels"), bf16_levels())


def test_one_table_for_all_runs_of_a_base(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path))
    bf16 = Settings(mixed_precision="bf16")
    first = base.modulation_table(model, bf16, CPU, "one")
    assert first is not None
    before = first.stat()
    assert base.modulation_table(model, bf16, CPU, "one") == first
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    assert base.modulation_table(model, bf16, CPU, "another") != first
    assert sorted(tmp_path.rglob("*.*")) == sorted(first.parent.iterdir())
    for none in (
        Settings(mixed_precision="no"),
        Settings(mixed_precision="bf16", modulation_table=False),
        Settings(mixed_precision="bf16", own_forward=False),
    ):
        assert base.modulation_table(model, none, CPU, "one") is None


def test_a_full_disk_is_one_line(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(QwenLoraError, match=r"No space left.* set modulation_table: false"):
        base.modulation_table(model, Settings(mixed_precision="bf16"), CPU, "one")
    assert list((tmp_path / "modulation").iterdir()) == []
