"""`qwen-lora shards info` and `list`: what a set holds, told without torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from qwen_lora.shards.generations import Generation, listed_files, walk_generations
from qwen_lora.shards.manifest import load_manifest, read_sidecar
from qwen_lora.shards.previews import read_prompts, read_rgb
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.safe import printable
from qwen_lora.shards.store import Place, opened_store

_SHOWN = 12  # lines of a histogram
_GENERATIONS_SHOWN = 4


def info(path: Place) -> dict[str, Any]:
    """What a set holds, as JSON values: counts, buckets, tokens, bytes, fingerprints, generations.

    Reads the manifests that are kept, one sidecar and what previews need. Raises InputError or
    ShardError as `load_manifest` does.
    """
    with opened_store(path) as store:
        manifest, generation = load_manifest(store)
        generations = [_generation_facts(each) for each in walk_generations(store)]
        first = read_sidecar(store, manifest.shards[0]) if manifest.shards else None
        rgb = read_rgb(store, manifest)
        prompts = read_prompts(store, manifest)
        label = store.label
    return {
        "path": label,
        "generation": generation,
        "generations": generations,
        "format": f"{manifest.format_major}.{manifest.format_minor}",
        "model": manifest.model,
        "counts": manifest.counts,
        "shards": len(manifest.shards),
        "histograms": manifest.histograms,
        "recipe": manifest.recipe,
        "posterior": manifest.posterior,
        "latent_channels": manifest.latent_channels,
        "latent_scale": manifest.latent_scale,
        "text_width": manifest.text_width,
        "preview_prompts": prompts,
        "rgb_map": rgb and {"scale": rgb.scale, "mean_abs_error": rgb.mean_abs_error},
        "fingerprint": asdict(manifest.fingerprint)
        | {
            "hash": manifest.fingerprint.hash,
            "vae_hash": manifest.fingerprint.vae_hash,
            "text_hash": manifest.fingerprint.text_hash,
        },
        "made_by": first.made_by if first else {},
    }


def _generation_facts(generation: Generation) -> dict[str, Any]:
    counts = generation.manifest.counts
    return {
        "name": generation.name,
        "samples": counts.get("samples", 0),
        "retired": counts.get("retired", 0),
        "bytes": sum(file.bytes for file in listed_files(generation.manifest).values()),
    }


def format_info(facts: dict[str, Any]) -> str:
    """`info` for a person."""
    counts, histograms, model = facts["counts"], facts["histograms"], facts["model"]
    fingerprint = facts["fingerprint"]
    revision = f"@{model['revision']}" if model.get("revision") else ""
    lines = [
        f"shard set    {facts['path']} (format {facts['format']}, {facts['generation']})",
        f"model        {model.get('id')}{revision}, family {fingerprint['family']}",
        f"samples      {counts.get('samples')} of {counts.get('images')} images, "
        f"{counts.get('captions')} captions, {counts.get('retired')} retired",
        f"size         {counts.get('bytes', 0) / (1 << 20):.1f} MiB in {facts['shards']} shards",
        f"fingerprint  {fingerprint['hash'][:12]} (VAE {fingerprint['vae_hash'][:12]}, text "
        f"{fingerprint['text_hash'][:12]})",
        f"tokens       {_token_line(histograms.get('tokens', {}))}",
        f"previews     {_preview_line(facts)}",
        "made by      " + ", ".join(f"{k} {v}" for k, v in sorted(facts["made_by"].items())),
        "recipe       " + ", ".join(f"{k} {v}" for k, v in sorted(facts["recipe"].items())),
    ]
    lines += _generation_lines(facts["generations"])
    lines += _histogram("buckets", histograms.get("buckets", {}))
    groups = histograms.get("groups", {})
    if set(groups) - {""}:
        lines += _histogram("groups", groups)
    return "\n".join(map(printable, lines))


def _generation_lines(generations: list[dict[str, Any]]) -> list[str]:
    """The newest first."""
    lines = [f"generations  {len(generations)}"]
    for each in generations[:_GENERATIONS_SHOWN]:
        lines.append(
            f"  {each['name']}  {each['samples']} samples, {each['retired']} retired, "
            f"{each['bytes'] / (1 << 20):.1f} MiB"
        )
    if len(generations) > _GENERATIONS_SHOWN:
        lines.append(f"  and {len(generations) - _GENERATIONS_SHOWN} older ones")
    return lines


def _preview_line(facts: dict[str, Any]) -> str:
    rgb, prompts = facts["rgb_map"], facts["preview_prompts"]
    line = "no latent-to-RGB map"
    if rgb is not None:
        line = (
            f"latent-to-RGB map, {rgb['scale']} pixels a latent, mean error "
            f"{rgb['mean_abs_error']:.3f}"
        )
    shown = [f'"{textwrap.shorten(prompt, 60)}"' for prompt in prompts[:3]]
    shown += ["..."] if len(prompts) > len(shown) else []
    return f"{line}; {len(prompts)} prompts" + (f": {', '.join(shown)}" if shown else "")


def _token_line(tokens: dict[str, int]) -> str:
    lengths = sorted((int(length), count) for length, count in tokens.items())
    if not lengths:
        return "none"
    half, seen, median = sum(count for _, count in lengths) / 2, 0, lengths[-1][0]
    for length, count in lengths:
        seen += count
        if seen >= half:
            median = length
            break
    return f"{lengths[0][0]} to {lengths[-1][0]}, median {median}"


def _histogram(title: str, counts: dict[str, int]) -> list[str]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{title:<12} {len(ordered)}"]
    lines += [f"  {name or '(top)':<18} {count}" for name, count in ordered[:_SHOWN]]
    if len(ordered) > _SHOWN:
        lines.append(f"  and {len(ordered) - _SHOWN} more")
    return lines


def list_samples(path: Place) -> Iterator[dict[str, Any]]:
    """One dict a live sample, hashes checked: ids, tokens, bytes, shard, and the JSON member."""
    with ShardSet.open(path) as shards:
        table = shards.table
        for row in range(len(table)):
            yield {
                "sample_id": table.sample_id[row],
                "latent_id": table.latent_id[row],
                "shard": shards.manifest.shards[int(table.shard[row])].tar.name,
                "token_counts": list(table.tokens_of(row)),
                "bytes": int(table.member_bytes[row].sum()),
                **asdict(shards.read_meta(row)),
            }


def shard_urls(path: Place) -> list[str]:
    """The tar files of the newest generation, as plain webdataset takes them."""
    with opened_store(path) as store:
        manifest = load_manifest(store)[0]
        return [store.where(entry.tar.name) for entry in manifest.shards]
