"""This project's forward pass against diffusers' own: predictions and gradients, for every way it
can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.tiny_model.build import TEXT_WIDTH
from qwen_lora.train.objective import flow_matching_loss
from tests.train.lora_model import LoraModel, lora_model, shake

RECOMPUTE = ("none", "selective", "1", "full")
TARGETS: tuple[Any, ...] = (
    "attention",
    "attention+text",
    "all-linear",
    "all-linear+mod",
    ["attn.to_k", "img_mlp.net.2"],
)
LENGTHS = {"one": [7], "equal": [5, 5], "mixed": [3, 9, 4]}


def made(folder: Path, own: bool, recompute: str = "none", **changes: Any) -> LoraModel:
    result = lora_model(folder, mixed_precision="no", **changes)
    shake(result, size=0.03)
    result.transformer.train()
    options = ForwardOptions(own=own, recompute=Recompute.parse(recompute))
    result.model.family.prepare_training(result.transformer, options)
    return result


def losses(of: LoraModel, lengths: list[int]) -> torch.Tensor:
    """[B] of one fixed batch; the last prompt's second token is no text."""
    random = torch.Generator().manual_seed(3)
    batch = len(lengths)
    latents, noise = (torch.randn(batch, 16, 6, 4, generator=random) for _ in range(2))
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    return flow_matching_loss(
        of.transformer,
        latents,
        [torch.randn(length, TEXT_WIDTH, generator=random) for length in lengths],
        masks,
        noise,
        torch.linspace(0.1, 0.9, batch),
        family=of.model.family,
    )


def gradients(of: LoraModel, lengths: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    values = losses(of, lengths)
    values.sum().backward()
    return values.detach(), {n: p.grad for n, p in of.parameters if p.grad is not None}


def check_same(
    ours: tuple[torch.Tensor, dict[str, torch.Tensor]],
    theirs: tuple[torch.Tensor, dict[str, torch.Tensor]],
    tolerance: float,
) -> None:
    """All gradients together to `tolerance`, each tensor (some are tiny) to ten times that."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    errors = {name: (ours[1][name] - expected).norm() for name, expected in theirs[1].items()}
    total = torch.stack(list(errors.values())).norm()
    assert total < tolerance * torch.stack([g.norm() for g in theirs[1].values()]).norm()
    for name, error in errors.items():
        assert error < 10 * tolerance * theirs[1][name].norm(), name


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_losses_and_gradients_are_diffusers(
    tiny_model: Path, targets: Any, lengths: list[int]
) -> None:
    """With LoRAs that are not zero, rsLoRA's scaling and an alpha of their own."""
    settings = {"lora_targets": targets, "lora_alpha": 7.0, "use_rslora": True}
    ours = gradients(made(tiny_model, True, **settings), lengths)
    theirs = gradients(made(tiny_model, False, **settings), lengths)
    check_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit(tiny_model: Path, recompute: str, dropout: float) -> None:
    def run(how: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = made(tiny_model, True, how, lora_dropout=dropout, lora_targets="all-linear")
        torch.manual_seed(4)  # dropout
        return gradients(model, LENGTHS["mixed"])

    (loss, ours), (expected, theirs) = run(recompute), run("none")
    assert torch.equal(loss, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
    if dropout:
        plain, _ = gradients(made(tiny_model, True, lora_targets="all-linear"), LENGTHS["mixed"])
        assert not torch.equal(plain, loss)


def test_bf16_is_as_near_to_float32_as_diffusers_is(tiny_model: Path) -> None:
    """Both round; neither is the other's reference."""
    exact, _ = gradients(made(tiny_model, False), LENGTHS["mixed"])

    def error(own: bool) -> float:
        model = lora_model(tiny_model, mixed_precision="bf16")
        shake(model)
        model.model.family.prepare_training(
            model.transformer, ForwardOptions(own, Recompute("none"))
        )
        values, grads = gradients(model, LENGTHS["mixed"])
        assert {gradient.dtype for gradient in grads.values()} == {torch.float32}
        return float((values - exact).norm() / exact.norm())

    ours, theirs = error(True), error(False)
    assert ours < max(2 * theirs, 2e-3), (ours, theirs)


@torch.no_grad()
def test_a_switched_off_lora_is_the_base(tiny_model: Path) -> None:
    """Previews without the LoRA go through the same forward."""
    model = made(tiny_model, True)
    model.transformer.disable_adapters()
    base = made(tiny_model, False)
    base.transformer.disable_adapters()
    torch.testing.assert_close(losses(model, [5]), losses(base, [5]), rtol=1e-6, atol=0)


def test_padding_and_masks_are_nowhere(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed lengths run each sample's attention by itself, on the path without a mask."""
    seen: list[tuple[torch.Size, int]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return attention(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model = made(tiny_model, True)
    blocks = len(model.transformer.transformer_blocks)
    losses(model, [3, 9, 4])
    image = 3 * 2
    inner = [(image + text, image + text) for text in (3, 9, 4)] * (blocks - 1)
    assert seen == [*inner, *((image, image + text) for text in (3, 9, 4))]
    seen.clear()
    losses(model, [5, 5])
    assert len(seen) == blocks


def test_the_last_block_does_no_dead_work(tiny_model: Path) -> None:
    """Its text query, output projection and MLP are not computed, and hold the gradient of
    nothing."""
    model = made(tiny_model, True)
    last = model.transformer.transformer_blocks[-1]
    called: list[str] = []
    for block in (model.transformer.transformer_blocks[0], last):
        for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.2"):
            where = "last" if block is last else "first"
            block.get_submodule(name).register_forward_hook(
                lambda *_, label=f"{where} {name}": called.append(label)
            )
    losses(model, [5])
    assert sorted(called) == [
        "first attn.add_q_proj",
        "first attn.to_add_out",
        "first txt_mlp.net.2",
    ]


def test_fewer_operators_than_diffusers(tiny_model: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.number += func.overloadpacket not in (torch.ops.aten.view, torch.ops.aten.t)
            return func(*args, **(kwargs or {}))

    def count(own: bool) -> int:
        model = made(tiny_model, own)
        with Count() as counted:
            losses(model, [5]).sum().backward()
        return counted.number

    assert count(True) < 0.85 * count(False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
def test_compiled_shapes_make_few_graphs(tiny_model: Path) -> None:
    """Buckets, batch sizes and text lengths of all kinds, equal and mixed: the numbers of the eager
    path, and no graph for each of them."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = made(tiny_model, True), made(tiny_model, True)
    options = ForwardOptions(recompute=Recompute("none"), compiled=True)
    compiled.model.family.prepare_training(compiled.transformer, options)
    random = torch.Generator().manual_seed(1)
    cases = [
        (size, [length] * batch)
        for size in ((4, 6), (6, 4), (8, 8), (2, 10), (10, 4))
        for batch, length in ((1, 3), (1, 17), (2, 9), (3, 5))
    ]
    cases += [(size, lengths) for size in ((4, 6), (8, 8)) for lengths in ([3, 8], [5, 2, 9])]
    for (height, width), lengths in cases:
        batch = len(lengths)
        inputs = (
            torch.randn(batch, 16, height, width, generator=random),
            [torch.randn(length, TEXT_WIDTH, generator=random) for length in lengths],
            [torch.ones(length, dtype=torch.bool) for length in lengths],
            torch.randn(batch, 16, height, width, generator=random),
            torch.rand(batch, generator=random),
        )
        found = []
        for model in (eager, compiled):
            values = flow_matching_loss(model.transformer, *inputs, family=model.model.family)
            values.sum().backward()
            found.append((values.detach(), {n: p.grad for n, p in model.parameters}))
        check_same(found[1], found[0], 1e-5)  # type: ignore[arg-type]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{graphs} graphs for {len(cases)} shapes")
    assert graphs <= 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # many, all inside torch.compile
def test_compiled_code_is_kept_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the system's temporary folder, unless somebody named another."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    from qwen_lora.families.qwen_image.compiled import CompiledBlock

    monkeypatch.setenv("QWEN_LORA_CACHE", str(tmp_path))
    for given in (default_cache_dir(), str(tmp_path / "named")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        CompiledBlock(1.0)
        assert Path(cache_dir()).name == ("named" if "named" in given else "compiled")
        assert Path(cache_dir()).parent == tmp_path
