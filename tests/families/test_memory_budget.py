"""What a compiled block keeps under a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_lora.config.schema import Settings
from qwen_lora.models import resolve_model
from qwen_lora.train.lora import LoraSpec, add_lora

TOKENS, WIDTH, HEADS = 4096, 256, 4
cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
flash = torch.ops.aten._scaled_dot_product_flash_attention


def attends(kernel: Any, x: torch.Tensor, inside: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    heads = (x @ inside).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
    rest = (None, True) if kernel is cudnn else ()
    attended = kernel(heads, heads, heads, *rest)[0]
    return torch.relu(attended.transpose(1, 2).flatten(2) @ out) @ out


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("kernel", [cudnn, flash])
@pytest.mark.parametrize("budget", [0.35, 0.5])
def test_attention_is_kept_before_products(kernel: Any, budget: float) -> None:
    """Whichever kernel it is."""
    from torch._functorch import partitioners
    from torch._functorch.aot_autograd import aot_function

    from qwen_lora.families.qwen_image.compiled import _budget

    kept: list[Any] = []
    torchs = partitioners.get_default_op_list

    def split(joint: Any, inputs: Any, *, num_fwd_outputs: int, **others: Any) -> Any:
        with _budget(budget):
            parts = partitioners.min_cut_rematerialization_partition(
                joint, inputs, num_fwd_outputs=num_fwd_outputs, **others
            )
        kept.extend(parts[0].graph.output_node().args[0][num_fwd_outputs:])
        return parts

    shapes = [(1, TOKENS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]
    tensors = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    aot_function(
        lambda *tensors: attends(kernel, *tensors),
        fw_compiler=lambda graph, _: graph,
        bw_compiler=lambda graph, _: graph,
        partition_fn=split,
    )(*tensors)
    sources = {str(node.args[0].target) for node in kept if "getitem" in node.name}
    assert sources == {str(kernel.default)}, kept
    assert partitioners.get_default_op_list is torchs


@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_captions_of_different_lengths_keep_what_equal_ones_do(
    tiny_model: Path, budget: float
) -> None:
    """But for which sample each token belongs to: no copy of heads in the samples' order."""
    from qwen_lora.families.qwen_image.compiled import kept_bytes

    model = resolve_model(str(tiny_model), ("transformer",))
    empty = model.family.empty_transformer(model, blocks=3, dtype=torch.bfloat16)
    add_lora(empty, LoraSpec.from_settings(Settings(rank=4)), model.family, 0)
    equal, mixed = (kept_bytes(empty, 64, texts, budget) for texts in ([20, 20], [13, 27]))
    assert 0 < equal <= mixed <= 1.01 * equal
