"""The settings that only precompute reads (besides data_config)."""

from __future__ import annotations

from typing import Literal

from qwen_lora.config.field import LocalPath, Prompts, Section, setting


class PrecomputeSettings(Section):
    """What shapes the shards, and how the work is done."""

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
        "Captions encoded at once, one behind the other without padding.",
        command="precompute",
        changes="shards",
        ge=1,
    )
    text_prefix_cache: bool = setting(
        True,
        "Compute the prompt template's beginning once instead of for every caption; rounding apart "
        "the embeddings are the same.",
        command="precompute",
        changes="shards",
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
    state_dir: LocalPath | None = setting(
        None,
        "With a URL as output: the folder for what .local holds (lock, report, remembered hashes); "
        "empty: one in ~/.cache/qwen-lora/state.",
        command="precompute",
        changes="nothing",
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
    preview_prompts: Prompts = setting(
        [],
        "Prompts that training draws previews of; their embeddings go into the shard set. A list, "
        "or one prompt; empty: those that the set has stay.",
        command="precompute",
        changes="nothing",
    )
