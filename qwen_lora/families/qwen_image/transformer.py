# ruff: noqa: TID253
"""Noised latents to a velocity through `QwenImageTransformer2DModel`, and what training asks of it.

Conventions as in diffusers' `QwenImagePipeline` and `train_dreambooth_lora_qwen_image.py`: 2x2
latent pixels are one token, time is sigma itself, the model predicts noise - latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qwen_lora.errors import InputError
from qwen_lora.families.base import ForwardOptions
from qwen_lora.families.modules import compute_dtype, unwrap
from qwen_lora.families.qwen_image.constants import PATCH
from qwen_lora.families.qwen_image.forward import OwnForward, predict
from qwen_lora.families.qwen_image.loading import (
    empty_module,
    load_weights,
    open_weights,
    quantize_linears,
)
from qwen_lora.families.qwen_image.modulation import (
    LAYERS,
    ModulationTable,
    TabledLinear,
    bf16_levels,
    write_table,
)
from qwen_lora.families.qwen_image.scaled import KINDS, check_products, scale_linears
from qwen_lora.families.qwen_image.sharded import run_whole, shard_blocks
from qwen_lora.families.qwen_image.tokens import pack, unpack
from qwen_lora.families.streaming import BlockStreamer, spread, stream_more
from qwen_lora.models import ModelFolder
from qwen_lora.progress import Progress

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ATTENTION_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION = ("img_mod.1", "txt_mod.1")
TARGET_SETS = {
    "attention": ATTENTION,
    "attention+text": ATTENTION + ATTENTION_TEXT,
    "all-linear": ATTENTION + ATTENTION_TEXT + MLP,
    "all-linear+mod": ATTENTION + ATTENTION_TEXT + MLP + MODULATION,
}
# The text stream's output of the last block is thrown away, and with it all that only feeds it.
DEAD_IN_LAST_BLOCK = (
    "attn.add_q_proj",
    "attn.to_add_out",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)


def load_transformer(
    model: ModelFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    base_precision: str,
    low_precision_products: str = "none",
    modulation_table: Path | None = None,
    blocks_on_device: int | None = None,
    mesh: DeviceMesh | None = None,
) -> torch.nn.Module:
    """See `families.base.Family.load_transformer`."""
    transformer = make_empty(model)
    table = ModulationTable(modulation_table) if modulation_table else None
    if table is not None:
        for block in transformer.transformer_blocks:
            for name in LAYERS:
                parent, _, leaf = name.rpartition(".")
                owner = block.get_submodule(parent)
                setattr(owner, leaf, TabledLinear(owner.get_submodule(leaf), device, dtype))
        transformer.modulation_table = table
    blocks = transformer.get_submodule("transformer_blocks")
    if base_precision in KINDS:
        if low_precision_products != "none":
            check_products(base_precision, device)
        scale_linears(blocks, base_precision, low_precision_products)
    elif base_precision == "nf4":
        quantize_linears(blocks, base_precision, dtype)
        transformer.is_loaded_in_4bit = True  # PEFT chooses its layers by it

    def name_of(key: str) -> str | None:
        tabled = table is not None and key.rpartition(".")[0].endswith(LAYERS)
        return None if tabled else key

    if mesh is not None:
        shard_blocks(transformer, mesh)
    filling = None
    if blocks_on_device is not None:
        filling = _Filling(transformer, blocks_on_device, device)
    load_weights(
        transformer,
        model.weights("transformer"),
        device=device,
        dtype=dtype,
        rename=name_of,
        placed=filling.placed if filling else lambda name: None,
        # The last bit of a product depends on where a weight begins, on a CPU: so that streamed
        # blocks compute what resident ones do.
        in_memory=True,
    )
    if filling:
        filling.streamer.finish()
        transformer.streamer = filling.streamer
    return cast(torch.nn.Module, transformer)


class _Filling:
    """Moves each streamed block to the host as soon as the last of its weights is loaded."""

    def __init__(self, transformer: Any, on_device: int, device: torch.device) -> None:
        self._blocks = transformer.transformer_blocks
        self.streamer = BlockStreamer(device)
        self._missing = {
            index: {name for name, _ in self._blocks[index].named_parameters()}
            for index in spread(len(self._blocks), max(0, len(self._blocks) - on_device))
        }

    def placed(self, name: str) -> None:
        owner, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        if owner != "transformer_blocks" or int(number) not in self._missing:
            return
        index = int(number)
        self._missing[index].discard(leaf)
        if not self._missing[index]:
            self.streamer.store(index, self._blocks[index])


def make_empty(model: ModelFolder, blocks: int | None = None) -> Any:
    """From the config alone, parameters on the meta device; `blocks`: only so many of them."""
    from diffusers import QwenImageTransformer2DModel

    config = {
        key: value
        for key, value in model.config("transformer").items()
        if not key.startswith("_") and key != "quantization_config"
    }
    if blocks is not None:
        config["num_layers"] = blocks
    return empty_module(lambda: QwenImageTransformer2DModel(**config))


def make_modulation_table(
    model: ModelFolder, path: Path, *, device: torch.device, dtype: torch.dtype
) -> None:
    """See `families.base.Family.make_modulation_table`."""
    if dtype != torch.bfloat16:
        raise InputError(f"a table of modulation is for bfloat16, not for {dtype}")
    transformer = make_empty(model)
    blocks = len(transformer.transformer_blocks)
    with open_weights(model.weights("transformer")) as read:

        def weight(name: str) -> torch.Tensor:
            return read(name).to(device, dtype)

        time = transformer.time_text_embed
        for name, _ in list(time.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(weight(f"time_text_embed.{name}"), requires_grad=False)
            time.get_submodule(owner)._parameters[leaf] = value
        like = torch.empty(0, device=device, dtype=dtype)

        def layer(block: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
            key = f"transformer_blocks.{block}.{name}"
            return weight(f"{key}.weight"), weight(f"{key}.bias")

        with torch.no_grad(), Progress("modulation table", blocks, "block") as progress:
            write_table(
                path,
                bf16_levels(),
                lambda level: time(level.to(device, dtype), like),
                layer,
                blocks,
                lambda _: progress.update(),
            )


def prepare_training(transformer: torch.nn.Module, options: ForwardOptions) -> None:
    """See `families.base.Family.prepare_training`."""
    model: Any = unwrap(transformer)
    if model.config.get("use_additional_t_cond"):
        raise InputError("this transformer wants a second time condition, which no training has")
    if options.blocks_on_device is not None:
        if getattr(model, "streamer", None) is None:
            model.streamer = BlockStreamer(model.img_in.weight.device)
        stream_more(model.streamer, model.transformer_blocks, options.blocks_on_device)
    if options.own:
        model.own_forward = OwnForward(model, options)
    elif options.recompute.kind != "none":
        model.enable_gradient_checkpointing()


# ---- forward -------------------------------------------------------------------------------------


def velocity(
    transformer: Callable[..., Any],
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: Sequence[torch.Tensor],
    prompt_masks: Sequence[torch.Tensor],
) -> torch.Tensor:
    """See `families.base.Family.velocity`. Raises InputError for shapes that do not fit."""
    tokens, (height, width) = pack(latents), latents.shape[-2:]
    predicted = token_velocity(
        transformer, tokens, (height, width), sigmas, prompt_embeds, prompt_masks
    )
    return unpack(predicted, height, width)


def token_velocity(
    transformer: Callable[..., Any],
    tokens: torch.Tensor,
    latent_size: tuple[int, int],
    sigmas: torch.Tensor,
    prompt_embeds: Sequence[torch.Tensor],
    prompt_masks: Sequence[torch.Tensor],
) -> torch.Tensor:
    """See `families.base.Family.token_velocity`. Raises InputError for shapes that do not fit."""
    model = unwrap(transformer)
    _check_shapes(model, tokens, sigmas, prompt_embeds, prompt_masks)
    dtype = compute_dtype(model)
    tokens, grid = tokens.to(dtype), (latent_size[0] // PATCH, latent_size[1] // PATCH)
    if hasattr(model, "own_forward"):
        texts = [
            (embeds if bool(mask.all()) else embeds[mask]).to(tokens.device, dtype)
            for embeds, mask in zip(prompt_embeds, prompt_masks, strict=True)
        ]
        return run_whole(model, lambda: predict(model, tokens, sigmas, texts, grid)).float()
    embeds, mask = join_prompts(prompt_embeds, prompt_masks)
    prediction: torch.Tensor = transformer(
        hidden_states=tokens,
        timestep=sigmas.to(tokens.device, dtype),
        encoder_hidden_states=embeds.to(tokens.device, dtype),
        # Without waiting: a blocking copy would end with a synchronisation of the stream.
        encoder_hidden_states_mask=(
            None if mask is None else mask.to(tokens.device, non_blocking=True)
        ),
        img_shapes=[[(1, *grid)]] * len(tokens),
        return_dict=False,
    )[0]
    return prediction.float()


def join_prompts(
    prompt_embeds: Sequence[torch.Tensor], prompt_masks: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[T_i, D] each -> [B, T, D] padded with zeros, and [B, T] bool, or None if all is text.

    Rotary positions of text start after the image's and do not depend on T, so padding at the end
    changes nothing for a sample but the mask.
    """
    if len(prompt_embeds) == 1:  # a view: nothing is copied
        mask = prompt_masks[0][None]
        return prompt_embeds[0][None], None if bool(mask.all()) else mask
    longest = max(len(embeds) for embeds in prompt_embeds)
    if all(len(embeds) == longest for embeds in prompt_embeds):
        mask = torch.stack(list(prompt_masks))
        return torch.stack(list(prompt_embeds)), None if bool(mask.all()) else mask
    first = prompt_embeds[0]
    joined = first.new_zeros(len(prompt_embeds), longest, first.shape[1])
    mask = torch.zeros(len(prompt_masks), longest, dtype=torch.bool, device=prompt_masks[0].device)
    for row, (embeds, valid) in enumerate(zip(prompt_embeds, prompt_masks, strict=True)):
        joined[row, : len(embeds)] = embeds
        mask[row, : len(valid)] = valid
    return joined, mask


def _check_shapes(
    model: Any,
    tokens: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: Sequence[torch.Tensor],
    prompt_masks: Sequence[torch.Tensor],
) -> None:
    batch, channels = len(tokens), tokens.shape[-1] // PATCH**2
    if not len(prompt_embeds) == len(prompt_masks) == len(sigmas) == batch:
        raise InputError(
            f"{batch} latents, {len(sigmas)} sigmas, {len(prompt_embeds)} prompt embeddings and "
            f"{len(prompt_masks)} masks do not make a batch"
        )
    for embeds, mask in zip(prompt_embeds, prompt_masks, strict=True):
        if embeds.ndim != 2 or mask.shape != embeds.shape[:1]:
            raise InputError(
                f"a prompt of shape {list(embeds.shape)} with a mask of shape {list(mask.shape)}: "
                "expected [T, D] and [T]"
            )
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "in_channels"):
        return
    if config.in_channels != channels * PATCH**2:
        raise InputError(
            f"latents have {channels} channels, the transformer takes "
            f"{config.in_channels // PATCH**2}: they are not from the same family"
        )
    width_found = {int(embeds.shape[1]) for embeds in prompt_embeds}
    if width_found != {config.joint_attention_dim}:
        raise InputError(
            f"prompt embeddings are {sorted(width_found)} wide, the transformer takes "
            f"{config.joint_attention_dim}: the shards are from another text encoder"
        )


# ---- LoRA targets --------------------------------------------------------------------------------


def lora_target_modules(transformer: torch.nn.Module, targets: str | Sequence[str]) -> list[str]:
    """See `families.base.Family.lora_target_modules`; names in the order of the model."""
    if isinstance(targets, str):
        if targets not in TARGET_SETS:
            known = ", ".join(TARGET_SETS)
            raise InputError(f"unknown LoRA target set {targets!r}; known: {known}, or a list")
        targets = TARGET_SETS[targets]
    if not targets:
        raise InputError("the list of LoRA targets is empty")
    linears = [
        name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    dead = _dead_modules(transformer)
    chosen: set[str] = set()
    for ending in targets:
        matched = {name for name in linears if _ends_with(name, ending)}
        if not matched:
            raise InputError(f"LoRA target {ending!r} is the end of no linear layer's name")
        if matched <= dead:
            raise InputError(f"LoRA target {ending!r} names only layers that get no gradient")
        chosen |= matched - dead
    return [name for name in linears if name in chosen]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _dead_modules(transformer: torch.nn.Module) -> set[str]:
    last = len(transformer.get_submodule("transformer_blocks")) - 1  # type: ignore[arg-type]
    return {f"transformer_blocks.{last}.{name}" for name in DEAD_IN_LAST_BLOCK}


# ---- time ----------------------------------------------------------------------------------------


def shift_mu(config: Mapping[str, Any], image_tokens: int) -> float:
    """The dynamic shift of an image of so many tokens: linear between the config's two points."""
    base_tokens = config.get("base_image_seq_len", 256)
    max_tokens = config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(base_shift + slope * (image_tokens - base_tokens))


def timestep_shift(
    config: Mapping[str, Any], latent_size: tuple[int, int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The shift that `FlowMatchEulerDiscreteScheduler` gives one image size, as a map on sigmas.

    mu is linear in the image's tokens, s = e^mu / (e^mu + 1/sigma - 1), and the result is stretched
    so that sigma 0 becomes `shift_terminal`: 1 - (1 - s)(1 - shift_terminal). (The scheduler
    stretches the last of its finitely many sigmas there; this is its limit for many steps.)
    Without dynamic shifting the factor e^mu is the config's `shift`.
    """
    if config.get("use_dynamic_shifting", False):
        mu = shift_mu(config, (latent_size[0] // PATCH) * (latent_size[1] // PATCH))
        linear = config.get("time_shift_type", "exponential") == "linear"
        factor = mu if linear else math.exp(mu)
    else:
        factor = float(config.get("shift", 1.0))
    terminal = float(config.get("shift_terminal") or 0.0)

    def shift(sigmas: torch.Tensor) -> torch.Tensor:
        shifted = factor / (factor + 1.0 / sigmas.float() - 1.0)
        return 1.0 - (1.0 - shifted) * (1.0 - terminal)

    return shift
