"""What a run has to add to the set so that training can show pictures: prompts and the RGB map."""

from __future__ import annotations

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError
from qwen_lora.models import ModelFolder
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.precompute.rgb_map import chosen_samples
from qwen_lora.precompute.worklist import Wanted

PromptPlan = tuple[tuple[str, int], ...]  # prompts to encode, each with its number of tokens


def plan_prompts(settings: Settings, model: ModelFolder, existing: ExistingSet) -> PromptPlan:
    """The preview prompts to encode: none when none are asked for, or the set has exactly these.

    Loads the tokenizer at most. Raises InputError for a prompt longer than the model reads.
    """
    prompts = settings.preview_prompts
    if not prompts or prompts == existing.preview_prompts():
        return ()
    counts = model.family.load_tokenizer(model).count(prompts)
    for number, count in enumerate(counts):
        if count.truncated:
            raise InputError(
                f"preview_prompts: entry {number + 1} has {count.tokens + count.truncated} tokens "
                f"({prompts[number][:40]!r}...), the model reads {count.tokens}; shorten it"
            )
    return tuple((prompt, count.tokens) for prompt, count in zip(prompts, counts, strict=True))


def preview_lines(
    settings: Settings, prompts: PromptPlan, existing: ExistingSet, wanted: Wanted
) -> list[str]:
    """What a run would do for previews, for a person."""
    lines = []
    if prompts:
        lines.append(f"{len(prompts)} preview prompts to encode")
    elif settings.preview_prompts:
        lines.append(f"{len(settings.preview_prompts)} preview prompts, in the set already")
    if wanted.samples and (existing.manifest is None or existing.manifest.rgb is None):
        images = len(chosen_samples(wanted.samples, wanted.samples.keys()))
        lines.append(f"the latent-to-RGB map for previews to be fitted to {images} samples")
    return lines
