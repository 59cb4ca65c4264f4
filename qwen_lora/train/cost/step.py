# ruff: noqa: TID253
"""Bytes and FLOPs of training steps, for any size, recomputation and number of blocks.

All blocks but the first and the last are alike, so a model of three blocks and one of four tell
what a block adds; a deep one need not be run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from qwen_lora.config.schema import Settings
from qwen_lora.families.base import ForwardOptions, Recompute
from qwen_lora.families.offload import COMPILED
from qwen_lora.families.streaming import RING
from qwen_lora.models import ModelFolder
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.cost.trace import Traced, flash_attention, trace
from qwen_lora.train.lora import LoraSpec, add_lora
from qwen_lora.train.objective import flow_matching_loss
from qwen_lora.train.transformer import uses_table

FEW = 3  # blocks: the first, the last, and one like all others
# Blocks' worth of gathered weights: of the one that runs, of the next as it arrives, and in place.
GATHERED = 3
ENDS = Recompute("some", 1)  # recomputes the last block alone
# Bytes of optimizer state for each float32 parameter. 8-bit states have a float32 scale for each
# 256 numbers.
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "prodigy": 16.0}


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass; bytes on one device."""

    weights: int
    lora: int  # parameters, gradients, optimizer state, weights in the compute type
    activations: int  # kept for the backward pass, and the micro-batch itself
    workspace: int  # what comes on top of that at the worst moment
    forward_flops: int
    backward_flops: int  # recomputation included
    forward_low: int  # of them, in products in 8 bits
    backward_low: int
    host: int = 0  # bytes of weights in host memory
    traffic: int = 0  # bytes of them that are copied to the device
    offloaded: int = 0  # bytes of compiled blocks' activations that leave, and come back

    @property
    def peak(self) -> int:
        return self.weights + self.lora + self.activations + self.workspace

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def low_flops(self) -> int:
        return self.forward_low + self.backward_low


def has_budget(settings: Settings) -> bool:
    """Whether blocks keep what a compiler's memory budget allows; those of a small or a spread
    model are not counted so (`StepModel.budgeted`)."""
    return settings.compile_blocks is True and settings.own_forward and settings.lora_dropout == 0


class StepModel:
    """What steps cost with one model and the settings' LoRA, optimizer and precision, on a GPU."""

    def __init__(
        self, model: ModelFolder, settings: Settings, dtype: torch.dtype, parts: int = 1
    ) -> None:
        """parts: devices over which the blocks' weights are spread."""
        self.model, self.settings, self.dtype, self.parts = model, settings, dtype, parts
        self.family = model.family
        config = model.config("transformer")
        self.blocks = self.family.block_count(config)
        facts = self.family.transformer_facts(config)
        self._channels, self._text_width = facts["latent_channels"], facts["text_width"]
        self._made: dict[int, _Skeleton] = {}
        self._traced: dict[tuple[int, Shape, Recompute], Traced] = {}
        self._kept: dict[tuple[Shape, float], int] = {}

    # ---- held through the run --------------------------------------------------------------

    @cached_property
    def parameters(self) -> int:
        """Of the whole model, the modulation layers included."""
        parts = [
            sum(p.numel() for p in self._empty(count, tabled=False).parameters())
            for count in self._counts
        ]
        return self._deep(parts)

    @cached_property
    def held_parameters(self) -> int:
        return self._deep([self._skeleton(count).held for count in self._counts])

    @cached_property
    def lora_parameters(self) -> int:
        return self._deep([self._skeleton(count).lora for count in self._counts])

    @cached_property
    def weight_bytes(self) -> int:
        whole = self._deep([self._skeleton(count).stored for count in self._counts])
        if self.parts == 1:
            return whole
        tabled = uses_table(self.settings, self.dtype)
        one, two = (self.family.stored_bytes(self._empty(count, tabled)) for count in (1, 2))
        each = two - one
        gathered = min(GATHERED, self.blocks) * each
        return whole - self.blocks * each + self.blocks * each // self.parts + gathered

    @cached_property
    def block_bytes(self) -> int:
        """Of one block's base weights."""
        few, more = (self._skeleton(count).stored for count in (FEW, FEW + 1))
        return more - few

    @cached_property
    def lora_bytes(self) -> int:
        """float32 parameters and gradients, and what the optimizer keeps."""
        return 8 * self.lora_parameters + self.state_bytes

    @property
    def cast_bytes(self) -> int:
        """The LoRA's weights as blocks take them (`FlatLora.cast_together`)."""
        together = self.settings.own_forward and self.settings.optimizer == "adamw"
        wide = self.dtype == torch.float32
        return self.dtype.itemsize * self.lora_parameters if together and not wide else 0

    @cached_property
    def state_bytes(self) -> int:
        """What the optimizer keeps; one that this project does not know is taken for AdamW."""
        each = STATE_BYTES.get(self.settings.optimizer, STATE_BYTES["adamw"])
        return int(each * self.lora_parameters)

    # ---- a step ----------------------------------------------------------------------------

    def cost(
        self, shape: Shape, recompute: Recompute, on_device: int | None = None, stay: int = 0
    ) -> Cost:
        """on_device: so many blocks' weights stay on the device, and a ring of buffers has the
        others in turn; None: all stay. stay: blocks whose activations stay where compiled blocks'
        are offloaded, besides the last ones."""
        if recompute.kind == "some" and recompute.blocks >= self.blocks:
            recompute = Recompute("full")
        if recompute.kind == "some" and recompute.blocks == 0:
            recompute = Recompute("none")
        if self.budgeted:
            found = self._compiled(shape, recompute, stay)
        elif recompute.kind == "some" and self.blocks > FEW + 1:
            found = self._some(shape, recompute.blocks)
        else:
            found = self._whole(shape, recompute)
        streamed = 0 if on_device is None else max(0, self.blocks - on_device)
        gone = max(0, streamed - RING) * self.block_bytes
        offloaded = 0
        if self.stays(recompute):
            each = self.offloaded_bytes(shape, recompute)
            offloaded = max(0, self.blocks - COMPILED - stay) * each
        return Cost(
            weights=self.weight_bytes - gone,
            lora=self.lora_bytes + self.cast_bytes,
            activations=found.kept,
            workspace=found.peak - found.kept,
            forward_flops=found.forward_flops,
            backward_flops=found.backward_flops,
            forward_low=found.forward_low,
            backward_low=found.backward_low,
            host=streamed * self.block_bytes,
            # Each comes once in a pass; at the two turns the ring has what is needed next.
            traffic=2 * gone,
            offloaded=offloaded,
        )

    def _whole(self, shape: Shape, recompute: Recompute) -> Traced:
        few, *more = (self._trace(count, shape, recompute) for count in self._counts)
        return few.plus(more[0], few, self.blocks - FEW) if more else few

    def _some(self, shape: Shape, blocks: int) -> Traced:
        """The last block is one of them. The worst moment is in one of the two kinds of block; all
        that other blocks keep is counted there."""
        none, full = (self._whole(shape, Recompute(kind)) for kind in ("none", "full"))
        few = self._trace(FEW, shape, Recompute("none"))
        end = self._trace(FEW, shape, ENDS)
        more = self._trace(FEW + 1, shape, Recompute("none"))
        few_full, more_full = (
            self._trace(count, shape, Recompute("full")) for count in (FEW, FEW + 1)
        )
        inner = blocks - 1
        found = none.plus(end, few).plus(more_full, few_full, inner).plus(more, few, -inner)
        peaks = [end.peak - end.kept]
        if inner:
            peaks.append(full.peak - full.kept)
        return replace(found, peak=found.kept + max(peaks))

    @property
    def budgeted(self) -> bool:
        """Whether blocks keep what a compiler's memory budget allows."""
        return has_budget(self.settings) and self.parts == 1 and self.blocks > 2

    def _compiled(self, shape: Shape, recompute: Recompute, stay: int) -> Traced:
        """Recomputing whole blocks without a compiler takes as much as the budget 0."""
        none, full = (self._whole(shape, Recompute(kind)) for kind in ("none", "full"))
        budget = recompute.budget(self.blocks)
        each = self.compiled_bytes(shape, recompute)
        kept = full.kept
        if self.offloads(recompute):
            held = min(COMPILED + stay, self.blocks)
            # What is traced has one block's inputs on the device.
            kept += held * each + (held - 1) * self.input_bytes(shape)
        else:
            kept += self.blocks * each
        found = none.plus(full, none, 1 - budget)
        return replace(found, kept=kept, peak=kept + full.peak - full.kept)

    def offloads(self, recompute: Recompute) -> bool:
        return self.settings.offload_activations and recompute.kind != "none"

    def stays(self, recompute: Recompute) -> bool:
        """Whether some blocks' activations may stay while others' leave."""
        return self.budgeted and self.offloads(recompute)

    def compiled_bytes(self, shape: Shape, recompute: Recompute) -> int:
        """What one compiled block keeps besides its inputs."""
        budget = recompute.budget(self.blocks)
        if not budget:
            return 0
        key = (shape, budget)
        if key not in self._kept:
            with flash_attention():
                self._kept[key] = self.family.compiled_bytes(
                    self._skeleton(FEW).transformer,
                    shape.latent_size,
                    shape.text_tokens,
                    budget,
                )
        return self._kept[key]

    def offloaded_bytes(self, shape: Shape, recompute: Recompute) -> int:
        """Of one compiled block, what leaves for host memory."""
        return self.compiled_bytes(shape, recompute) + self.input_bytes(shape)

    def input_bytes(self, shape: Shape) -> int:
        """Of one block: what full recomputation keeps of it where nothing is offloaded."""
        staying = self
        if self.settings.offload_activations:
            settings = self.settings.model_copy(update={"offload_activations": False})
            staying = StepModel(self.model, settings, self.dtype, self.parts)
        key = (shape, 0.0)
        if key not in self._kept:
            few, more = (staying._trace(n, shape, Recompute("full")) for n in (FEW, FEW + 1))
            self._kept[key] = more.kept - few.kept
        return self._kept[key]

    @property
    def _counts(self) -> tuple[int, ...]:
        return (self.blocks,) if self.blocks <= FEW + 1 else (FEW, FEW + 1)

    def _deep(self, parts: Sequence[int]) -> int:
        """The number for all blocks, from those for `_counts`."""
        if len(parts) == 1:
            return parts[0]
        few, more = parts
        return few + (self.blocks - FEW) * (more - few)

    def _trace(self, blocks: int, shape: Shape, recompute: Recompute) -> Traced:
        key = (blocks, shape, recompute)
        if key not in self._traced:
            warm = any(
                (count, other.latent_size) == (blocks, shape.latent_size)
                for count, other, _ in self._traced
            )
            self._traced[key] = self._run(
                self._skeleton(blocks).transformer, shape, recompute, warm
            )
        return self._traced[key]

    def _run(
        self, transformer: torch.nn.Module, shape: Shape, recompute: Recompute, warm: bool
    ) -> Traced:
        options = ForwardOptions(
            own=self.settings.own_forward,
            recompute=recompute,
            offload_activations=self.settings.offload_activations,
        )
        self.family.prepare_training(transformer, options)
        size = (shape.batch, self._channels, *shape.latent_size)
        latents, noise = (torch.empty(size, device="meta") for _ in range(2))  # [B, C, h, w]
        texts = [
            torch.empty(count, self._text_width, device="meta", dtype=torch.bfloat16)
            for count in shape.text_tokens
        ]
        masks = [torch.ones(count, dtype=torch.bool) for count in shape.text_tokens]
        found = trace(
            lambda: flow_matching_loss(
                transformer,
                latents,
                texts,
                masks,
                noise,
                torch.ones(shape.batch),
                weighting_scheme=self.settings.loss_weighting,
                family=self.family,
            ),
            warm=warm,
        )
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in (latents, noise, *texts))
        return replace(found, kept=found.kept + inputs, peak=found.peak + inputs)

    # ---- skeletons -------------------------------------------------------------------------

    def _empty(self, blocks: int, tabled: bool) -> torch.nn.Module:
        return self.family.empty_transformer(
            self.model,
            blocks=blocks,
            dtype=self.dtype,
            base_precision=self.settings.base_precision,
            low_precision_products=self.settings.low_precision_products,
            tabled=tabled,
        )

    def _skeleton(self, blocks: int) -> _Skeleton:
        if blocks not in self._made:
            transformer = self._empty(blocks, uses_table(self.settings, self.dtype))
            held = sum(parameter.numel() for parameter in transformer.parameters())
            stored = self.family.stored_bytes(transformer)
            spec = LoraSpec.from_settings(self.settings)
            loras = add_lora(transformer, spec, self.family, self.settings.seed)
            for _, parameter in loras:
                parameter.grad = torch.empty_like(parameter)
            transformer.train()
            lora = sum(parameter.numel() for _, parameter in loras)
            self._made[blocks] = _Skeleton(transformer, held, stored, lora)
        return self._made[blocks]


@dataclass(frozen=True)
class _Skeleton:
    transformer: torch.nn.Module
    held: int  # base parameters
    stored: int  # their bytes
    lora: int  # LoRA parameters
