"""What a report tells of a run, as plain values: nothing here knows HTML.

No absolute path, user or host name gets into it: people share the page.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_lora.config.field import Section
from qwen_lora.config.names import fields, setting_facts, value_of
from qwen_lora.config.schema import Settings
from qwen_lora.config.template import yaml_text
from qwen_lora.redact import redact_values
from qwen_lora.train.report.pictures import data_uri

if TYPE_CHECKING:
    from qwen_lora.shards.previews import RgbMap
    from qwen_lora.shards.reader import ShardSet
    from qwen_lora.train.assemble import DataPlan
    from qwen_lora.train.sources import Sources
    from qwen_lora.train.table import PlanTable

SHOWN_SAMPLES, SHOWN_HELD_OUT = 24, 6
SAMPLE_SIDE = 176  # pixels
SHOWN_BUCKETS, TOKEN_BINS = 8, 12
CAPTION_CHARACTERS = 600  # of a caption; the rest is not looked at under a thumbnail
_ABSOLUTE = re.compile(r"[~/\\]|[A-Za-z]:[\\/]")


# ---- the data ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One thumbnail."""

    picture: str | None  # data URI; None without a map
    caption: str
    held_out: bool


@dataclass(frozen=True)
class SetFacts:
    """One shard set."""

    name: str
    samples: int
    weight: float
    fingerprint: str
    generation: str


@dataclass(frozen=True)
class DataFacts:
    """The samples of a run."""

    samples: int  # trained on
    duplicates: int
    images: int  # distinct files, held-out ones included
    captions: int  # of the trained samples
    held_out: int  # images
    visits: float  # an epoch
    buckets: list[tuple[str, int]]  # "height x width", most frequent first
    tokens: list[tuple[str, int]]  # "from - to", every bin
    groups: list[tuple[str, int, float]]  # name, samples, visits an epoch; only if there are some
    sets: list[SetFacts]
    shown: list[Sample]


def data_facts(plan: DataPlan, sources: Sources, rgb: RgbMap | None) -> DataFacts:
    """Reads up to SHOWN_SAMPLES records; the rest is in the tables."""
    table = plan.table
    sizes, counts = np.unique(table.bucket, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    buckets = [(f"{sizes[i][0]} × {sizes[i][1]}", int(counts[i])) for i in order]
    images = {sha for shard_set in sources.sets for sha in shard_set.table.source_sha256}
    return DataFacts(
        samples=len(table),
        duplicates=table.duplicates,
        images=len(images),
        captions=len(table.token_counts),
        held_out=len(plan.held_out),
        visits=float(table.weight.sum()),
        buckets=buckets,
        tokens=histogram(table.token_counts.tolist()),
        groups=_groups(table, sources.sets),
        sets=[
            SetFacts(
                name=by_name(shard_set.store.label),
                samples=len(shard_set),
                weight=weight,
                fingerprint=shard_set.manifest.fingerprint.hash[:12],
                generation=shard_set.generation.removeprefix("manifest-").removesuffix(".json"),
            )
            for shard_set, weight in zip(sources.sets, sources.weights, strict=True)
        ],
        shown=_samples(plan, sources.sets, rgb),
    )


def histogram(values: Sequence[int]) -> list[tuple[str, int]]:
    """Counts in bins of equal, whole width."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / TOKEN_BINS))
    bins = Counter((value - low) // width for value in values)
    result = []
    for number in range((high - low) // width + 1):
        first = low + number * width
        name = str(first) if width == 1 else f"{first}–{first + width - 1}"
        result.append((name, bins[number]))
    return result


def _groups(table: PlanTable, sets: Sequence[ShardSet]) -> list[tuple[str, int, float]]:
    counts: Counter[str] = Counter()
    visits: dict[str, float] = defaultdict(float)
    rows = zip(table.set_index.tolist(), table.set_row.tolist(), table.weight.tolist(), strict=True)
    for index, row, weight in rows:
        name = sets[index].table.group[row]
        counts[name] += 1
        visits[name] += weight
    if set(counts) <= {""}:
        return []
    return [(name, count, visits[name]) for name, count in counts.most_common()]


def _samples(plan: DataPlan, sets: Sequence[ShardSet], rgb: RgbMap | None) -> list[Sample]:
    """A few of the trained samples and of the held-out ones, one of each image."""
    held = [(plan.measured, row) for row in _distinct(plan.measured, sets, SHOWN_HELD_OUT)]
    if not plan.held_out:
        held = []
    trained = _distinct(plan.table, sets, SHOWN_SAMPLES - len(held))
    chosen = [*((plan.table, row) for row in trained), *held]
    return [
        _sample(table, row, sets, rgb, number >= len(trained))
        for number, (table, row) in enumerate(chosen)
    ]


def _distinct(table: PlanTable, sets: Sequence[ShardSet], count: int) -> list[int]:
    """The first `count` rows that show different images; rows are in order of their hashes."""
    rows: dict[str, int] = {}
    for row in range(len(table)):
        source = sets[int(table.set_index[row])].table.source_sha256[int(table.set_row[row])]
        rows.setdefault(source, row)
        if len(rows) == count:
            break
    return list(rows.values())


def _sample(
    table: PlanTable, row: int, sets: Sequence[ShardSet], rgb: RgbMap | None, held_out: bool
) -> Sample:
    from PIL import Image

    record = sets[int(table.set_index[row])].read(int(table.set_row[row]), captions=[])
    meta, tensors = record.meta, record.tensors
    caption = next(iter(meta.captions or []), None) or meta.source or table.sample_id(row)[:12]
    picture = None
    if rgb is not None:
        latents = tensors["latents" if "latents" in tensors else "posterior_mean"]
        pixels = rgb.apply(np.nan_to_num(latents.float().numpy()))  # [H, W, 3]
        picture = data_uri(Image.fromarray(pixels), SAMPLE_SIDE)
    return Sample(picture, caption[:CAPTION_CHARACTERS], held_out)


# ---- settings ------------------------------------------------------------------------------------


def setting_lines(settings: Settings, model_id: str) -> tuple[list[tuple[str, str]], ...]:
    """(key, value) of what train reads: those that differ from the defaults, then the others."""
    changed: list[tuple[str, str]] = []
    default: list[tuple[str, str]] = []
    for key, fact in setting_facts().items():
        if fact.command == "precompute":
            continue
        value = value_of(settings, key)
        is_default = value == fields()[key].get_default(call_default_factory=True)
        shown: Any = redact_values(without_folders(value))
        if key == "pretrained_model_name_or_path" and value is not None:
            shown = model_id
        (default if is_default else changed).append((key, yaml_text(shown) or "(empty)"))
    return changed, default


def without_folders(value: Any) -> Any:
    """The same value with every path cut down to its name."""
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, PurePath) or (isinstance(value, str) and _ABSOLUTE.match(value)):
        return by_name(value)
    return value


def by_name(path: PurePath | str) -> str:
    """The last part of a path; a home folder, whose name is a person's, is only ~."""
    name = PureWindowsPath(path).name if "\\" in str(path) else PurePath(path).name
    if not name or name == "..":
        name = Path(path).resolve().name
    return "~" if name == Path.home().name and Path(path).resolve() == Path.home() else name


# ---- the curves ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """Rows of metrics.jsonl."""

    rows: list[dict[str, Any]]

    def of(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever there is a finite value."""
        found = ((row["step"], row.get(key)) for row in self.rows)
        return [
            (float(step), float(value))
            for step, value in found
            if isinstance(value, int | float) and math.isfinite(value)
        ]

    def last(self, key: str) -> float | None:
        points = self.of(key)
        return points[-1][1] if points else None

    @property
    def measure(self) -> str:
        """Which loss was measured at fixed noise levels."""
        return "validation_loss" if self.of("validation_loss") else "fixed_train_loss"

    @property
    def by_sigma(self) -> list[tuple[float, list[tuple[float, float]]]]:
        """The measure at each noise level, in their order."""
        start = f"{self.measure}_at_"
        keys = {key for row in self.rows for key in row if key.startswith(start)}
        return sorted((float(key.removeprefix(start)), self.of(key)) for key in keys)

    @property
    def training_seconds(self) -> float:
        """Of all steps; measuring, saving and drawing are not in it."""
        return sum(count * seconds for count, seconds in self._steps("step_seconds"))

    @property
    def waiting_share(self) -> float | None:
        """Of training_seconds, for records; None when no line tells."""
        if not self.of("data_wait_seconds") or not self.training_seconds:
            return None
        waited = sum(count * seconds for count, seconds in self._steps("data_wait_seconds"))
        return waited / self.training_seconds

    def _steps(self, key: str) -> Iterator[tuple[float, float]]:
        """(steps of a line, its value a step)."""
        before = 0.0
        for step, value in self.of(key):
            yield step - before, value
            before = step
