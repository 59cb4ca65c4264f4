"""What only rank 0 does: plan the run, and publish what all ranks made of it."""

from __future__ import annotations

from pathlib import Path

from qwen_lora.config.schema import Settings
from qwen_lora.models import ModelFolder
from qwen_lora.precompute import plan as planning
from qwen_lora.precompute.encode import Encoded, Station
from qwen_lora.precompute.encoders import pick_device, placement_on
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.precompute.fingerprint import (
    check_fingerprint,
    check_recipe,
    made_by,
    make_fingerprint,
    make_recipe,
)
from qwen_lora.precompute.order import Order
from qwen_lora.precompute.publish import publish_generation
from qwen_lora.precompute.remembered import RememberedFailures, RememberedSources
from qwen_lora.precompute.report import (
    PrecomputeSummary,
    summarize,
    write_report,
)
from qwen_lora.precompute.types import Skip
from qwen_lora.precompute.worklist import Adoption, Wanted, adopt
from qwen_lora.precompute.write import check_space, free_space


class Lead:
    """Holds what planning found out until the shards are made."""

    existing: ExistingSet
    images: planning.Images
    wanted: Wanted
    adoption: Adoption

    def __init__(self, settings: Settings, model: ModelFolder, local: Path) -> None:
        self.settings, self.model, self.local = settings, model, local
        self.folder = settings.shards_dir
        self.failures = RememberedFailures(local / "failures.json")
        self.recipe = make_recipe(settings)

    def plan(self) -> Order:
        """Scan, compare with the set that is there, cut what is missing into shards.

        Raises InputError before an encoder is loaded: another fingerprint or recipe, too little
        space, no dataset.
        """
        found = planning.scan(self.settings)
        self.fingerprint = make_fingerprint(self.model, self.settings, self.local / "weights.json")
        self.existing = ExistingSet.load(self.folder)
        if self.existing.manifest is not None:
            check_fingerprint(self.existing.manifest, self.fingerprint, self.folder)
            check_recipe(self.existing.manifest, self.recipe, self.folder)
        sources = RememberedSources(
            self.local / "sources.json", planning.remembered_rules(self.settings)
        )
        self.images = planning.accept_images(
            found, self.settings, self.model.family.image_multiple, sources
        )
        sources.save()
        self.wanted = planning.name_samples(self.images, self.fingerprint)
        missing = [
            sample
            for sample in self.wanted.samples.values()
            if sample.sample_id not in self.existing.sources
        ]
        planned = planning.plan_shards(missing, self.model, self.settings)
        unlisted = self.existing.unlisted(self.fingerprint) if planned else []
        self.adoption = adopt(planned, unlisted)
        shards = self.adoption.shards + planning.cut(self.adoption.leftovers, self.settings)
        device = pick_device()
        sequential = placement_on(device, self.model, self.settings) != "together"
        check_space(self.folder, planning.needed_bytes(shards, sequential), free_space(self.folder))
        return Order(
            shards=tuple(shards),
            known_failures=self._known_failures(),
            fingerprint=self.fingerprint,
            made_by=made_by(self.settings, device.type),
            unconditional=self.existing.manifest is None,
        )

    def _known_failures(self) -> dict[str, Skip]:
        known = {}
        for sample_id, sample in self.wanted.samples.items():
            skip = self.failures.find(sample_id, sample.inspection.candidate.image.name)
            if skip is not None:
                known[sample_id] = skip
        return known

    def publish(self, done: Encoded, station: Station) -> PrecomputeSummary:
        """Manifest (unless nothing changed or nothing is there), report, summary."""
        self.failures.remember(done.failures)
        made = {*done.sample_ids, *self.adoption.sample_ids}
        superseded = self.existing.superseded(self.wanted, done.failures)
        manifest_name = self.existing.manifest_name
        entries = [*self.adoption.entries, *done.entries]
        live = len(self.existing.live(self.wanted, superseded)) + len(made)
        if self.existing.manifest is not None or entries:
            manifest_name = publish_generation(
                self.existing,
                entries,
                folder=self.folder,
                model=self.model,
                fingerprint=self.fingerprint,
                recipe=self.recipe,
                posterior=self.settings.vae_posterior,
                retired=self.existing.retired_after(self.wanted, superseded),
                unconditional=lambda: self._unconditional(done, station),
            )
        outcome = self._outcome(done, made)
        report = write_report(self.local, outcome)
        return summarize(
            outcome,
            max_skip=self.settings.max_skip,
            samples=live,
            samples_written=len(made),
            manifest=manifest_name,
            report=report,
        )
