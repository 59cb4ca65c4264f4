"""Every setting, with its default, in one schema for both commands.

`Settings` is frozen; YAML, `--set` and options are merged in `qwen_lora.config.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qwen_lora.config.field import setting

Optimizer = str  # adamw | adamw8bit | prodigy | module.Class


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(Section):
    """data_config: the images, their captions and their geometry (stage 1), and caption dropout."""

    img_dir: Path | None = setting(
        None,
        "Folder of captioned images, or WebDataset tars of them.",
        command="precompute",
        changes="nothing",
    )
    img_size: list[int] = setting(
        [1024],
        "Target resolution: buckets have about this many pixels squared; one number or a list.",
        command="precompute",
        changes="shards",
    )
    caption_dropout_rate: float = setting(
        0.1,
        "Share of visits that see the empty prompt instead of the caption.",
        command="train",
        changes="result",
        ge=0,
        le=1,
    )
    random_ratio: bool = setting(
        False,
        "Crop each image to 16:9, 4:3 or 1:1, drawn from the image's own hash and the seed.",
        command="precompute",
        changes="shards",
    )
    caption_type: Literal["auto", "txt", "caption", "json"] = setting(
        "auto",
        "Which sidecar holds the caption: .txt, .caption, .json, or whichever is there.",
        command="precompute",
        changes="shards",
    )
    caption_source: Literal["error", "sidecar", "metadata"] = setting(
        "error",
        "Which wins when an image has both a sidecar and a row in a metadata file.",
        command="precompute",
        changes="shards",
    )
    caption_lines: Literal["join", "variants", "first"] = setting(
        "join",
        "A caption file of several lines: one caption, one caption a line, or the first line.",
        command="precompute",
        changes="shards",
    )
    trigger_word: str = setting(
        "",
        "Put before every caption, followed by a comma.",
        command="precompute",
        changes="shards",
    )
    empty_caption: Literal["skip", "unconditional"] = setting(
        "skip",
        "An image whose caption is empty: skip and report it, or train it without a prompt.",
        command="precompute",
        changes="shards",
    )
    kohya_repeats: bool = setting(
        False,
        "Read folder names such as 10_cat as group cat with weight 10.",
        command="both",
        changes="result",
    )
    group_weights: dict[str, float] = setting(
        {},
        "Visits an epoch of each group (first folder); groups not named have weight 1.",
        command="train",
        changes="result",
    )
    bucket_step: int | None = setting(
        None,
        "Bucket sides are multiples of this; empty: 64 px, 16 below 512 px.",
        command="precompute",
        changes="shards",
    )
    square: bool = setting(
        False,
        "One square bucket per resolution instead of aspect-ratio buckets.",
        command="precompute",
        changes="shards",
    )
    min_aspect: float = setting(
        0.25,
        "Narrowest bucket, width / height.",
        command="precompute",
        changes="shards",
        gt=0,
        le=1,
    )
    max_aspect: float = setting(
        4.0,
        "Widest bucket, width / height.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    upscale: bool = setting(
        False,
        "Enlarge images that are smaller than their bucket instead of using a smaller one.",
        command="precompute",
        changes="shards",
    )
    flip: Literal["none", "both"] = setting(
        "none",
        "both: cache every image and its mirror image.",
        command="precompute",
        changes="shards",
    )
    resize: Literal["fast", "exact"] = setting(
        "fast",
        "fast: OpenCV area down, Lanczos up; exact: Pillow Lanczos.",
        command="precompute",
        changes="shards",
    )
    alpha_background: str = setting(
        "#ffffff",
        "Colour behind transparent pixels.",
        command="precompute",
        changes="shards",
    )
    animated: Literal["refuse", "first"] = setting(
        "refuse",
        "Animations and multi-page files: report them, or take the first frame.",
        command="precompute",
        changes="shards",
    )
    max_pixels: int = setting(
        100_000_000,
        "Larger images are refused before they are decoded.",
        command="precompute",
        changes="shards",
        gt=0,
    )
    follow_symlinks: bool = setting(
        False,
        "Follow links that lead out of the dataset folder.",
        command="precompute",
        changes="shards",
    )


class ShardSource(Section):
    """One entry of `shards`."""

    path: Path
    weight: float = setting(1.0, "Visits an epoch.", command="train", changes="result", gt=0)


class Settings(Section):
    """All settings of both commands."""

    # -- both ----------------------------------------------------------------------------------
    pretrained_model_name_or_path: str | None = setting(
        None,
        "Hugging Face id (id@revision) or folder in diffusers layout; empty: Qwen/Qwen-Image, "
        "for train the model that the shards record.",
        command="both",
        changes="result",
    )
    data_config: DataConfig = setting(
        DataConfig(), "Images and captions.", command="both", changes="shards"
    )
    shards_dir: Path = setting(
        Path("shards"), "Where the shard set is.", command="both", changes="nothing"
    )
    seed: int = setting(0, "Seed of every random choice.", command="both", changes="result", ge=0)

    # -- precompute ----------------------------------------------------------------------------
    vae_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Compute type of the VAE.",
        command="precompute",
        changes="shards",
    )
    text_encoder_dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16",
        "Compute type of the text encoder.",
        command="precompute",
        changes="shards",
    )
    text_encoder_quantization: Literal["none", "int8", "nf4"] = setting(
        "none",
        "Load the text encoder in 8 or 4 bits (needs the quant extra; changes the embeddings).",
        command="precompute",
        changes="shards",
    )
    vae_posterior: Literal["mode", "mean_std"] = setting(
        "mode",
        "Store the posterior's mode, or mean and spread so that training draws afresh.",
        command="precompute",
        changes="shards",
    )
    vae_batch_size: int = setting(
        4,
        "Images encoded at once, inside one bucket and shard.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    text_batch_size: int = setting(
        16,
        "Captions encoded at once, sorted by length.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    encoder_placement: Literal["auto", "together", "sequential", "offload"] = setting(
        "auto",
        "Both encoders on the card, one after the other (under 24 GB), or the text encoder "
        "streamed from host memory (cards smaller than it).",
        command="precompute",
        changes="nothing",
    )
    encode_threads: int = setting(
        4,
        "CPU threads of the encoders; part of what fixes the bytes.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    decode_workers: int = setting(
        4,
        "Threads that decode and resize images.",
        command="precompute",
        changes="nothing",
        ge=1,
    )
    shard_max_mib: int = setting(
        128, "Largest shard, MiB.", command="precompute", changes="shards", ge=1
    )
    shard_max_samples: int | None = setting(
        None,
        "Most samples in a shard; empty: max(16, samples / 64).",
        command="precompute",
        changes="shards",
        ge=1,
    )
    max_skip: int | None = setting(
        None,
        "Skipped files beyond this end in exit code 1; empty: the larger of 10 and 1 %.",
        command="precompute",
        changes="nothing",
        ge=0,
    )
    captions_in_shards: bool = setting(
        True,
        "Store caption texts in the shards (--no-captions leaves them out).",
        command="precompute",
        changes="shards",
    )
    source_names: bool = setting(
        True,
        "Store relative file names in the shards (--no-source-names leaves them out).",
        command="precompute",
        changes="shards",
    )

    # -- train: what runs ----------------------------------------------------------------------
    shards: list[ShardSource] = setting(
        [],
        "Shard sets with weights; empty: shards_dir.",
        command="train",
        changes="result",
    )
    output_dir: Path = setting(
        Path("output"), "Where the run is written.", command="train", changes="nothing"
    )
    train_batch_size: int = setting(
        1, "Samples of one forward pass on one device.", command="train", changes="result", ge=1
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
    num_processes: int = setting(
        1,
        "Devices; the command starts that many processes.",
        command="train",
        changes="nothing",
        ge=1,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto",
        "Compute type of the transformer; auto: bf16 on a GPU that has it, no on a CPU.",
        command="train",
        changes="result",
    )
    base_precision: Literal["bf16", "int8", "nf4"] = setting(
        "bf16",
        "How the frozen block weights are held; bf16 means: in the compute type.",
        command="train",
        changes="result",
    )
    gradient_checkpointing: bool = setting(
        True,
        "Recompute activations in the backward pass: less memory, about 30 % more time.",
        command="train",
        changes="nothing",
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
    lora_targets: str | list[str] = setting(
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
    optimizer_args: dict[str, Any] = setting(
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
    lr_scheduler: str = setting(
        "constant",
        "Any diffusers schedule: constant, constant_with_warmup, linear, cosine, "
        "cosine_with_restarts, polynomial, piecewise_constant.",
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
    logging_steps: int = setting(
        10, "Steps between lines of metrics.jsonl.", command="train", changes="nothing", ge=1
    )
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        [],
        "Trackers besides metrics.jsonl.",
        command="train",
        changes="nothing",
    )
    tracker_project_name: str = setting(
        "qwen-lora", "Project name for trackers.", command="train", changes="nothing"
    )
    logging_dir: Path = setting(
        Path("logs"), "Folder of the trackers, inside the run.", command="train", changes="nothing"
    )
    read_ahead: int = setting(
        4, "Micro-batches read and decoded ahead.", command="train", changes="nothing", ge=0
    )
