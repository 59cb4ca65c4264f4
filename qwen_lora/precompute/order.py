"""What rank 0 asks of all ranks, and what each answers, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen_lora.precompute.previews import PromptPlan
from qwen_lora.precompute.stored import StoredParts
from qwen_lora.precompute.types import Skip
from qwen_lora.precompute.worklist import ShardPlan, item_from_json, item_to_json
from qwen_lora.shards.format import FileEntry, Fingerprint, ShardEntry


@dataclass(frozen=True)
class Order:
    """The same for every rank; rank r takes shards r, r + W, r + 2W, ..."""

    shards: tuple[ShardPlan, ...]
    known_failures: Mapping[str, Skip]  # by sample id
    fingerprint: Fingerprint
    made_by: Mapping[str, Any]
    unconditional: bool  # the set has no unconditional embedding yet: rank 0 makes it
    prompts: PromptPlan  # previews' prompts that the set lacks: rank 0 encodes them
    stored: StoredParts  # what the set that is there holds of these shards

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": [[item_to_json(item) for item in shard] for shard in self.shards],
            "known_failures": failures_to_json(self.known_failures),
            "fingerprint": asdict(self.fingerprint),
            "made_by": dict(self.made_by),
            "unconditional": self.unconditional,
            "prompts": [list(prompt) for prompt in self.prompts],
            "stored": self.stored.to_json(),
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Order:
        return cls(
            shards=tuple(
                tuple(item_from_json(item) for item in shard) for shard in facts["shards"]
            ),
            known_failures=failures_from_json(facts["known_failures"]),
            fingerprint=Fingerprint(**facts["fingerprint"]),
            made_by=facts["made_by"],
            unconditional=facts["unconditional"],
            prompts=tuple((prompt, tokens) for prompt, tokens in facts["prompts"]),
            stored=StoredParts.from_json(facts["stored"]),
        )


def failures_to_json(failures: Mapping[str, Skip]) -> dict[str, list[str]]:
    return {key: [skip.name, skip.reason, skip.detail] for key, skip in failures.items()}


def failures_from_json(facts: Mapping[str, Sequence[str]]) -> dict[str, Skip]:
    return {key: Skip(*skip) for key, skip in facts.items()}


def entry_to_json(entry: ShardEntry) -> dict[str, Any]:
    return asdict(entry)


def entry_from_json(facts: Mapping[str, Any]) -> ShardEntry:
    return ShardEntry(FileEntry(**facts["tar"]), FileEntry(**facts["sidecar"]), facts["samples"])
