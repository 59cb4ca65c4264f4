"""The settings that only train reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationInfo, field_validator

from qwen_lora.config.field import (
    ListOf,
    ListOrNone,
    LocalPath,
    Section,
    SetPlace,
    SplitCommas,
    TypedLeaves,
    setting,
)

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")


def _path_as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


class ShardSource(Section):
    """One entry of `shards`."""

    path: SetPlace
    weight: float = setting(1.0, "Visits an epoch.", command="train", changes="result", gt=0)


class TrainSettings(Section):
    """What runs, the LoRA, the optimizer, the objective, checkpoints and logs."""

    # -- train: what runs ----------------------------------------------------------------------
    shards: Annotated[list[Annotated[ShardSource, BeforeValidator(_path_as_source)]], ListOf] = (
        setting(
            [],
            "Shard sets with weights; empty: shards_dir.",
            command="train",
            changes="result",
        )
    )
    output_dir: LocalPath = setting(
        Path("output"), "Where the run is written.", command="train", changes="nothing"
    )
    train_batch_size: int = setting(
        1, "Samples of one forward pass on one device.", command="train", changes="result", ge=1
    )
    batch_pixels: int = setting(
        0,
        "More samples of small buckets in a forward pass, as many as have this many pixels "
        "together (1048576: four of 512 x 512); 0: train_batch_size of every bucket.",
        command="train",
        changes="result",
        ge=0,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "Forward passes of one optimizer step on each device.",
        command="train",
        changes="result",
        ge=1,
    )
    max_train_steps: int = setting(
        3000, "Optimizer steps.", command="train", changes="result", ge=1
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto",
        "Compute type of the transformer; auto: bf16 on a GPU that has it, no on a CPU.",
        command="train",
        changes="result",
    )
    transformer_file: LocalPath | None = setting(
        None,
        "Weights of the transformer in a single safetensors file, with diffusers' or ComfyUI's "
        "names, instead of the model's own; also fp8 and fp8_scaled.",
        command="train",
        changes="nothing",
    )
    base_precision: Literal["bf16", "fp8", "int8", "nf4"] = setting(
        "bf16",
        "How the frozen block weights are held; bf16 means: in the compute type; fp8 and int8: "
        "with one scale for each output channel.",
        command="train",
        changes="result",
    )
    low_precision_products: Literal["none", "forward", "both"] = setting(
        "none",
        "Matrix products themselves in 8 bits, with base_precision fp8 (GPUs from compute "
        "capability 8.9) or int8 (8.0): in the forward pass, or in both (with a second copy of the "
        "weights). none: weights are cast up for each product.",
        command="train",
        changes="result",
    )
    gradient_checkpointing: bool = setting(
        True,
        "Recompute activations in the backward pass: less memory, about 30 % more time.",
        command="train",
        changes="nothing",
    )

    recompute: str = setting(
        "auto",
        "What gradient_checkpointing computes anew: full (each block), selective (all but matrix "
        "products and attention), a number of blocks (if compiled: that much memory), or auto: as "
        "little as the GPU's memory allows (full on a CPU).",
        command="train",
        changes="nothing",
    )
    blocks_on_device: str = setting(
        "auto",
        "Blocks of the frozen base that stay on the GPU; the others lie in host memory and are "
        "copied for each use: a number, all, or auto: as many as fit (all on a CPU).",
        command="train",
        changes="nothing",
    )
    offload_activations: bool = setting(
        False,
        "Keep what gradient_checkpointing keeps in host memory until the backward pass, for long "
        "sequences.",
        command="train",
        changes="nothing",
    )
    oom_fallback: bool = setting(
        False,
        "When a step, a validation or a preview runs out of GPU memory, do it again with more "
        "recomputed and fewer blocks on the device, instead of ending the run.",
        command="train",
        changes="nothing",
    )
    own_forward: bool = setting(
        True,
        "This trainer's own forward pass; false: diffusers'. The same up to rounding.",
        command="train",
        changes="result",
    )
    compile_blocks: Literal["auto"] | bool = setting(
        "auto",
        "torch.compile of the transformer's blocks; auto: on a GPU where torch's compiler works, "
        "for runs of 200 steps and more. The same up to rounding.",
        command="train",
        changes="result",
    )
    attention: Literal["auto", "torch", "cudnn", "flash", "flash3", "efficient"] = setting(
        "auto",
        "Attention kernel on a GPU; auto: the fastest of a measurement at the run's first start; "
        "torch: torch's choice; flash3: FlashAttention 3, if installed. The same up to rounding.",
        command="train",
        changes="result",
    )
    shard_base: Literal["none", "node", "all"] = setting(
        "none",
        "With several processes, hold the frozen base once for all of them, each a part of every "
        "block (torch's FSDP2), for cards that it does not fit: once for each machine, or once "
        "for all machines. Compiled and recomputing, blocks then round a little differently.",
        command="train",
        changes="nothing",
    )
    modulation_table: bool = setting(
        True,
        "In bf16, replace a third of the weights, which depend on the noise level alone, by a "
        "table on disk (5.7 GB for Qwen-Image, made once). The same up to rounding.",
        command="train",
        changes="result",
    )

    # -- train: LoRA ---------------------------------------------------------------------------
    rank: int = setting(16, "LoRA rank.", command="train", changes="result", ge=1)
    lora_alpha: float | None = setting(
        None, "LoRA alpha; empty: the rank.", command="train", changes="result", gt=0
    )
    lora_dropout: float = setting(
        0.0, "Dropout in front of the LoRA.", command="train", changes="result", ge=0, lt=1
    )
    lora_init: Literal["gaussian", "kaiming", "orthogonal"] = setting(
        "gaussian",
        "How LoRA's A is initialised; B starts at zero (orthogonal: both, product zero).",
        command="train",
        changes="result",
    )
    use_rslora: bool = setting(
        False, "Scale by alpha / sqrt(rank).", command="train", changes="result"
    )
    lora_targets: Annotated[str | list[str], SplitCommas] = setting(
        "attention",
        "attention, attention+text, all-linear, all-linear+mod, or a list of module endings.",
        command="train",
        changes="result",
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32",
        "Type of the LoRA file.",
        command="train",
        changes="nothing",
    )

    # -- train: optimizer ----------------------------------------------------------------------
    optimizer: str = setting(
        "adamw", "adamw, adamw8bit, prodigy, or module.Class.", command="train", changes="result"
    )
    optimizer_args: Annotated[dict[str, Any], TypedLeaves] = setting(
        {}, "More arguments of the optimizer.", command="train", changes="result"
    )
    learning_rate: float = setting(
        1e-4, "Peak learning rate.", command="train", changes="result", gt=0
    )
    adam_beta1: float = setting(0.9, "Adam's beta1.", command="train", changes="result", ge=0, lt=1)
    adam_beta2: float = setting(
        0.999, "Adam's beta2.", command="train", changes="result", ge=0, lt=1
    )
    adam_weight_decay: float = setting(
        0.01, "AdamW's weight decay.", command="train", changes="result", ge=0
    )
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", command="train", changes="result", gt=0)
    max_grad_norm: float = setting(
        1.0,
        "Gradients are clipped to this norm; 0: never.",
        command="train",
        changes="result",
        ge=0,
    )
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = setting(
        "constant",
        "Any diffusers schedule.",
        command="train",
        changes="result",
    )
    lr_warmup_steps: int = setting(
        0, "Steps of linear warm-up.", command="train", changes="result", ge=0
    )
    lr_num_cycles: int = setting(
        1, "Restarts of cosine_with_restarts.", command="train", changes="result", ge=1
    )
    lr_power: float = setting(
        1.0, "Exponent of polynomial.", command="train", changes="result", gt=0
    )
    lr_step_rules: str | None = setting(
        None,
        "Rules of piecewise_constant, as diffusers writes them: 1:10,0.1:20,0.01.",
        command="train",
        changes="result",
    )

    # -- train: objective ----------------------------------------------------------------------
    timestep_sampling: Literal["none", "logit_normal", "mode"] = setting(
        "none",
        "Density of the noise level; none is uniform.",
        command="train",
        changes="result",
    )
    logit_mean: float = setting(0.0, "Mean of logit_normal.", command="train", changes="result")
    logit_std: float = setting(
        1.0, "Spread of logit_normal.", command="train", changes="result", gt=0
    )
    mode_scale: float = setting(1.29, "Scale of mode.", command="train", changes="result")
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = setting(
        "none",
        "Weight of the loss over the noise level.",
        command="train",
        changes="result",
    )
    timestep_shift: float | Literal["none", "model"] = setting(
        "none",
        "none, a number, or model: the scheduler's own shift.",
        command="train",
        changes="result",
    )
    shuffle: Literal["full", "block"] = setting(
        "full",
        "block: shuffle inside blocks of shards, for sets larger than the cache.",
        command="train",
        changes="result",
    )

    # -- train: checkpoints, validation, logs --------------------------------------------------
    checkpointing_steps: int = setting(
        250, "Steps between checkpoints.", command="train", changes="nothing", ge=1
    )
    checkpoints_total_limit: int = setting(
        10, "Checkpoints kept.", command="train", changes="nothing", ge=1
    )
    resume_from_checkpoint: str = setting(
        "latest",
        "latest, or the name of a checkpoint folder in the run.",
        command="train",
        changes="nothing",
    )
    validation_fraction: float = setting(
        0.0,
        "Share of images held out of training for the validation loss.",
        command="train",
        changes="result",
        ge=0,
        lt=1,
    )
    validation_steps: int = setting(
        250, "Steps between validations; 0: never.", command="train", changes="nothing", ge=0
    )
    validation_max_images: int = setting(
        64, "Most images one validation looks at.", command="train", changes="nothing", ge=1
    )
    preview_steps: int | None = setting(
        None,
        "Steps between previews; empty: checkpointing_steps if the shards hold preview prompts, "
        "otherwise none; 0: never.",
        command="train",
        changes="nothing",
        ge=0,
    )
    preview_inference_steps: int = setting(
        20, "Sampling steps of a preview.", command="train", changes="nothing", ge=2
    )
    preview_guidance: float = setting(
        4.0,
        "True classifier-free guidance of previews; up to 1: none, at half the time.",
        command="train",
        changes="nothing",
        ge=0,
    )
    preview_seed: int = setting(
        0,
        "Noise of the previews, as `qwen-lora sample --seed` draws it.",
        command="train",
        changes="nothing",
        ge=0,
        lt=2**63,
    )
    preview_size: Annotated[list[int] | None, ListOf] = setting(
        None,
        "[height, width] of previews in pixels; empty: the most frequent bucket.",
        command="train",
        changes="nothing",
    )
    preview_vae: bool = setting(
        False,
        "Decode previews with the model's VAE instead of the shards' linear map; asks for previews "
        "by itself.",
        command="train",
        changes="nothing",
    )
    logging_steps: int = setting(
        10, "Steps between lines of metrics.jsonl.", command="train", changes="nothing", ge=1
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], ListOrNone] = setting(
        [],
        "Trackers besides metrics.jsonl.",
        command="train",
        changes="nothing",
    )
    tracker_project_name: str = setting(
        "qwen-lora", "Project name for trackers.", command="train", changes="nothing"
    )
    logging_dir: LocalPath = setting(
        Path("logs"), "Folder of the trackers, inside the run.", command="train", changes="nothing"
    )
    read_ahead: int = setting(
        4, "Micro-batches read and decoded ahead.", command="train", changes="nothing", ge=0
    )

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value in OPTIMIZERS or "." in value.strip("."):
            return value
        raise ValueError(f"must be {', '.join(OPTIMIZERS)} or module.Class, not {value!r}")

    @field_validator("recompute", "blocks_on_device")
    @classmethod
    def _word_or_number(cls, value: str, info: ValidationInfo) -> str:
        words = ("auto", "full", "selective") if info.field_name == "recompute" else ("auto", "all")
        if value in words or value.isdecimal():
            return value
        raise ValueError(f"must be {', '.join(words)} or a number of blocks")

    @field_validator("preview_size")
    @classmethod
    def _height_and_width(cls, value: list[int] | None) -> list[int] | None:
        if value is None or (len(value) == 2 and min(value) > 0):
            return value
        raise ValueError("must be [height, width] in pixels")

    @field_validator("lora_targets")
    @classmethod
    def _some_target(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and "" in value):
            raise ValueError("names no module")
        return value
