"""What a run would do, told without an encoder, a lock or a written byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.precompute import plan as planning
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.precompute.fingerprint import (
    check_fingerprint,
    check_recipe,
    chosen_facts,
    make_recipe,
)
from qwen_lora.precompute.output import folder_option, local_folder, local_state, open_output
from qwen_lora.precompute.previews import plan_prompts, preview_lines
from qwen_lora.precompute.remembered import RememberedSources
from qwen_lora.precompute.report import (
    Outcome,
    PrecomputeSummary,
    printable,
    sort_files,
    summarize,
)
from qwen_lora.precompute.sync import Removal, Sync, find_removed
from qwen_lora.precompute.write import check_space, free_space, mib
from qwen_lora.shards.format import Fingerprint
from qwen_lora.shards.store import Store

SHOWN_FILES = 50


def preview(settings: Settings, sync: Sync | None = None) -> PrecomputeSummary:
    """Print buckets, samples, bytes needed and free, and bad files.

    Only the tokenizer is loaded. Bad files are those whose name, caption or header tells; damage in
    the pixels shows when they are decoded. Raises InputError when there is too little space.
    """
    with open_output(settings) as store:
        return _preview(settings, store, sync)


def _preview(settings: Settings, store: Store, sync: Sync | None) -> PrecomputeSummary:
    folder = local_folder(settings)
    model = light_model(settings)
    existing = ExistingSet.load(store)
    recipe = make_recipe(settings)
    if existing.manifest is None:
        # Sample ids only serve to tell records apart here, so no weight has to be hashed.
        fingerprint = Fingerprint(model.family.name, {}, {})
    else:
        # The model is taken to be the set's own: hashing its weights may take minutes.
        old, chosen = existing.manifest.fingerprint, chosen_facts(settings)
        fingerprint = replace(
            old, vae={**old.vae, **chosen["vae"]}, text={**old.text, **chosen["text"]}
        )
        check_fingerprint(existing.manifest, fingerprint, store.label)
        check_recipe(existing.manifest, recipe, store.label)
    remembered = RememberedSources(
        local_state(settings) / "sources.json", planning.remembered_rules(settings)
    )
    images = planning.accept_images(
        planning.scan(settings), settings, model.family.image_multiple, remembered
    )
    wanted = planning.name_samples(images, fingerprint)
    planning.tell_moved(existing.moved(wanted))
    removal = Removal()
    if sync is not None and sync.wanted:
        removal = find_removed(existing, wanted, images.skips, remembered, settings)
    missing = planning.missing_samples(wanted, existing.sources)
    shards = planning.plan_shards(missing, model, settings)
    outcome = sort_files(
        images.skips,
        wanted.files,
        wanted.twins,
        live_before=existing.sources,
        written_ids={sample.sample_id for sample in missing},
        failures={},
    )
    _print_bad_files(outcome)
    print(f"{len(missing)} samples to encode in {len(shards)} shards, by height x width:")
    for line in planning.bucket_lines(shards):
        print(line)
    prompts = plan_prompts(settings, model, existing)
    for line in preview_lines(settings, prompts, existing, wanted):
        print(line)
    if line := removal.line():
        needs = removal.large and sync is not None and not sync.confirmed
        print(line + (" (needs --yes)" if needs else ""))
    retired = existing.retired_after(wanted, ()) | removal.sample_ids
    needed = planning.needed_bytes(shards, sequential=False, passing=store.is_remote)
    free = free_space(folder)
    print(f"{mib(needed)} needed, {mib(free)} free at {folder}")
    summary = summarize(
        outcome,
        max_skip=settings.max_skip,
        samples=len(existing.sources) + len(missing) - len(retired),
        samples_written=len(missing),
        retired=len(retired - existing.retired),
        manifest=existing.manifest_name,
        report=Path("the report of the real run"),
    )
    print("\n".join(["a run would end with:", *summary.lines()]))
    check_space(folder, needed, free, folder_option(settings))
    return summary


def _print_bad_files(outcome: Outcome) -> None:
    for skip in outcome.skipped[:SHOWN_FILES]:
        detail = f" ({printable(skip.detail)})" if skip.detail else ""
        print(f"{printable(skip.name)}: {skip.reason}{detail}")
    if len(outcome.skipped) > SHOWN_FILES:
        print(f"... and {len(outcome.skipped) - SHOWN_FILES} more bad files")


def light_model(settings: Settings) -> ModelFolder:
    """The model with its tokenizer and the text encoder's config, but no weight downloaded."""
    name = settings.pretrained_model_name_or_path or planning.DEFAULT_MODEL
    model = resolve_model(name, ["tokenizer"])
    config = model.path / "text_encoder" / "config.json"
    if model.revision is not None and not config.is_file():
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(model.model_id, "text_encoder/config.json", revision=model.revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"model {name}: text_encoder/config.json cannot be had ({reason})"
            ) from None
    return model
