"""What only rank 0 does: plan the run, and publish what all ranks made of it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError
from qwen_lora.models import ModelFolder
from qwen_lora.precompute import plan as planning
from qwen_lora.precompute.encode import (
    Encoded,
    Station,
    encode_preview_prompts,
    encode_unconditional,
)
from qwen_lora.precompute.encoders import encoding_mode, pick_device, placement_on
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.precompute.fingerprint import (
    check_fingerprint,
    check_recipe,
    made_by,
    make_fingerprint,
    make_recipe,
)
from qwen_lora.precompute.joining import without_stored
from qwen_lora.precompute.order import Order
from qwen_lora.precompute.output import folder_option, local_folder
from qwen_lora.precompute.previews import PromptPlan, plan_prompts
from qwen_lora.precompute.remembered import RememberedFailures, RememberedSources
from qwen_lora.precompute.report import (
    Outcome,
    PrecomputeSummary,
    sort_files,
    summarize,
    write_report,
)
from qwen_lora.precompute.rgb_map import fit_rgb_map
from qwen_lora.precompute.sync import Removal, Sync, find_removed
from qwen_lora.precompute.texts import TextStore
from qwen_lora.precompute.types import Skip
from qwen_lora.precompute.worklist import Adoption, ShardPlan, Wanted, adopt
from qwen_lora.precompute.write import check_space, free_space
from qwen_lora.shards.format import FileEntry, Manifest, ShardEntry
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.base import ChangedRemotely
from qwen_lora.shards.store import Store
from qwen_lora.shards.writer import (
    build_manifest,
    publish_manifest,
    write_previews,
    write_retired,
    write_rgb,
    write_unconditional,
)

MOST_CONFLICTS = 10  # generations that others publish while this run publishes one


class Lead:
    """Holds what planning found out until the shards are made."""

    existing: ExistingSet
    images: planning.Images
    wanted: Wanted
    adoption: Adoption
    prompts: PromptPlan
    sources: RememberedSources

    def __init__(
        self,
        settings: Settings,
        model: ModelFolder,
        store: Store,
        local: Path,
        sync: Sync | None = None,
    ) -> None:
        self.settings, self.model, self.store, self.local = settings, model, store, local
        self.sync = sync or Sync()
        self.folder = local_folder(settings)
        self.recipe = make_recipe(settings)
        self.failures = RememberedFailures(local / "failures.json")

    def plan(self) -> Order:
        """Scan, compare with the set that is there, cut what is missing into shards.

        Raises InputError before an encoder is loaded: no dataset, another fingerprint or recipe, a
        large removal that is not confirmed, too little space.
        """
        found = planning.scan(self.settings)
        self.existing = ExistingSet.load(self.store)  # weights may take minutes to hash: first
        self.fingerprint = make_fingerprint(self.model, self.settings, self.local / "weights.json")
        self._check_existing()
        self.sources = RememberedSources(
            self.local / "sources.json", planning.remembered_rules(self.settings)
        )
        multiple = self.model.family.image_multiple
        try:
            self.images = planning.accept_images(found, self.settings, multiple, self.sources)
        finally:
            self.sources.save()  # a run that is stopped here need not hash them all again
        self.wanted = planning.name_samples(self.images, self.fingerprint)
        planning.tell_moved(self.existing.moved(self.wanted))
        self._find_removed(()).check(self.sync, planning.dataset_folder(self.settings))
        self.prompts = plan_prompts(self.settings, self.model, self.existing)
        missing = planning.missing_samples(self.wanted, self.existing.sources)
        planned = planning.plan_shards(missing, self.model, self.settings)
        self.adoption = adopt(planned, self._unlisted(planned))
        shards = self.adoption.shards + planning.cut(self.adoption.leftovers, self.settings)
        device = pick_device()
        sequential = placement_on(device, self.model, self.settings) != "together"
        needed = planning.needed_bytes(shards, sequential, passing=self.store.is_remote)
        option = folder_option(self.settings)
        check_space(self.folder, needed, free_space(self.folder), option)
        return Order(
            shards=tuple(shards),
            known_failures=self._known_failures(),
            fingerprint=self.fingerprint,
            made_by=made_by(self.settings, device.type),
            unconditional=self.existing.manifest is None,
            prompts=self.prompts,
            stored=self.existing.find(item for shard in shards for item in shard),
        )

    def _unlisted(self, planned: Sequence[ShardPlan]) -> list[tuple[ShardEntry, list[str]]]:
        """Whole shards that a stopped run left, of samples that this one is to make."""
        missing = {item.sample_id for shard in planned for item in shard}
        return self.existing.unlisted(self.fingerprint, missing) if missing else []

    def _find_removed(self, failures: Iterable[Skip]) -> Removal:
        """What `--sync` retires when these images could not be encoded either."""
        if not self.sync.wanted:
            return Removal()
        skips = [*self.images.skips, *failures]
        return find_removed(self.existing, self.wanted, skips, self.sources, self.settings)

    def _known_failures(self) -> dict[str, Skip]:
        known = {}
        for sample_id, sample in self.wanted.samples.items():
            skip = self.failures.find(sample_id, sample.inspection.candidate.image.name)
            if skip is not None and sample_id not in self.existing.sources:
                known[sample_id] = skip
        return known

    def publish(self, done: Encoded, station: Station) -> PrecomputeSummary:
        """Manifest (unless nothing changed, or there is nothing), report, summary."""
        TextStore(self.local).clear()
        self.failures.remember(done.failures)
        made = {*done.sample_ids, *self.adoption.sample_ids}
        removal = self._find_removed(done.failures.values())
        if line := removal.line():
            print(line, file=sys.stderr)
        manifest_name, retired = self._publish_joined(done, made, removal.sample_ids, station)
        outcome = self._outcome(done, made)
        return summarize(
            outcome,
            max_skip=self.settings.max_skip,
            samples=len({*self.existing.sources, *made} - retired),
            samples_written=len(made),
            retired=len(retired - self.existing.retired),
            manifest=manifest_name,
            report=write_report(self.local, outcome),
        )

    def _publish_joined(
        self, done: Encoded, made: Collection[str], removed: Collection[str], station: Station
    ) -> tuple[str | None, frozenset[str]]:
        """The generation's name and its retired samples. A remote set may have got another
        generation since it was read: then this run's shards are added to that one."""
        new = [*self.adoption.entries, *done.entries]
        for _ in range(MOST_CONFLICTS):
            retired = self.existing.retired_after(self.wanted, done.failures).union(removed)
            try:
                return self._publish_generation(new, done, retired, station), retired
            except ChangedRemotely:
                print(f"{self.store.label} has a new generation: joining it", file=sys.stderr)
            self.existing = ExistingSet.load(self.store)
            self._check_existing()
            self._check_kept({*made, *done.failures})
            new = without_stored(self.store, new, self.existing)
        raise QwenLoraError(
            f"{self.store.label} got another generation {MOST_CONFLICTS} times while this run "
            "published its own; its shards are there: run the same command again"
        )

    def _check_kept(self, made: Collection[str]) -> None:
        """Raises QwenLoraError when a sample that was in the set is not in the new generation."""
        lost = self.wanted.samples.keys() - self.existing.sources.keys() - set(made)
        if lost:
            raise QwenLoraError(
                f"{self.store.label}: {len(lost)} samples of this dataset were pruned while this "
                "run made others; its shards are there: run the same command again"
            )

    def _check_existing(self) -> None:
        if self.existing.manifest is not None:
            check_fingerprint(self.existing.manifest, self.fingerprint, self.store.label)
            check_recipe(self.existing.manifest, self.recipe, self.store.label)

    def _publish_generation(
        self, new: Sequence[ShardEntry], done: Encoded, retired: frozenset[str], station: Station
    ) -> str | None:
        """The new generation's name, the old one's if it says the same, None without a sample.

        Raises ChangedRemotely when another generation was published meanwhile.
        """
        old = self.existing.manifest
        if old is None and not new:
            return None
        previews = self._previews(done, station)
        unchanged = (
            old is not None
            and not new
            and (old.recipe, self.existing.retired) == (self.recipe, retired)
            and previews == old.previews
        )
        if unchanged and old is not None and old.rgb is not None:
            return self.existing.manifest_name
        manifest = build_manifest(
            self.store,
            shards=[*self.existing.shards, *new],
            fingerprint=self.fingerprint,
            latent_channels=self.model.family.latent_channels,
            latent_scale=self.model.family.latent_scale,
            text_width=self.model.family.text_width(self.model),
            posterior=self.settings.vae_posterior,
            model={"id": self.model.model_id, "revision": self.model.revision},
            recipe=self.recipe,
            unconditional=old.unconditional if old else self._unconditional(done, station),
            retired=write_retired(self.store, retired),
            previous=self.existing.manifest_name,
            previews=previews,
            rgb=old.rgb if old else None,
        )
        if manifest.rgb is None:
            manifest = replace(manifest, rgb=self._fit_rgb_map(manifest))
            if unchanged and manifest.rgb is None:
                return self.existing.manifest_name
        return publish_manifest(self.store, manifest)

    def _unconditional(self, done: Encoded, station: Station) -> FileEntry:
        text = done.unconditional
        if text is None:  # every shard was adopted, or made by other ranks
            with encoding_mode(self.settings.encode_threads):
                text = encode_unconditional(station)
        return write_unconditional(self.store, text.prompt_embeds, text.prompt_mask)

    def _previews(self, done: Encoded, station: Station) -> FileEntry | None:
        """The preview prompts of this run, or those that the set has."""
        if not self.prompts:
            return self.existing.manifest.previews if self.existing.manifest else None
        prompts = done.prompts
        if prompts is None:  # this rank had no caption to encode
            with encoding_mode(self.settings.encode_threads):
                prompts = encode_preview_prompts(self.prompts, station)
        return write_previews(self.store, prompts)

    def _fit_rgb_map(self, manifest: Manifest) -> FileEntry | None:
        """Fitted once, to the set's first images; None when none of them can be decoded."""
        shards = ShardSet.of_manifest(self.store, manifest, "the new generation")
        try:
            rgb = fit_rgb_map(shards, self.wanted.samples, self.settings)
        finally:
            shards.close_files()
        return write_rgb(self.store, rgb) if rgb else None

    def _outcome(self, done: Encoded, made: set[str]) -> Outcome:
        outcome = sort_files(
            self.images.skips,
            self.wanted.files,
            self.wanted.twins,
            live_before=self.existing.sources,
            written_ids=made,
            failures=done.failures,
        )
        return outcome.with_partial(self.images.partial)
