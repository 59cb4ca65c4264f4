"""The gradients of all ranks in one buffer. What they are on several ranks: test_two_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qwen_lora.train.gradients import FlatGradients


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_one_buffer_and_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False))
    twin = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False))
    twin.load_state_dict(model.state_dict())
    shared = FlatGradients(list(model.parameters()))
    reduced: list[torch.Tensor] = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda buffer: reduced.append(all_reduce(buffer) or buffer)
    )

    for _ in range(2):
        shared.clear()
        twin.zero_grad()
        for _ in range(3):  # accumulated
            x = torch.randn(4, 5)
            model(x).square().mean().backward()
            twin(x).square().mean().backward()
        assert shared.sum(torch.tensor(0.625)).item() == 0.625
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            assert torch.equal(mine.grad, theirs.grad)

    assert len(reduced) == 2  # one a step, whatever the number of parameters
    (buffer,) = {(view.data_ptr(), view.numel()) for view in reduced}
    held = sum(parameter.numel() for parameter in model.parameters())
    assert held <= buffer[1] <= held + 32 * (1 + len(list(model.parameters())))
    for parameter in model.parameters():
        assert parameter.grad is not None
        offset = parameter.grad.data_ptr() - buffer[0]
        assert offset % 128 == 0 and 0 < offset < 4 * buffer[1], "a view of the buffer, aligned"
