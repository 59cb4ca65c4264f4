"""Train refuses data_config values that contradict the shard set's recipe."""

from typing import Any

import pytest

from qwen_lora.config.load import explicit_keys, load_settings
from qwen_lora.config.recipe import check_against_manifest
from qwen_lora.errors import InputError
from qwen_lora.shards.format import FileEntry, Fingerprint, Manifest

RECIPE: dict[str, Any] = {"img_size": [512, 1024], "flip": "none", "bucket_step": None, "seed": 3}
MANIFEST = Manifest(
    fingerprint=Fingerprint("qwen-image", {}, {}),
    latent_channels=16,
    latent_scale=8,
    text_width=8,
    posterior="mode",
    model={},
    recipe=RECIPE,
    shards=(),
    unconditional=FileEntry("u", 0, ""),
    counts={},
    histograms={},
)


def check(*given: str) -> None:
    settings = load_settings("train", None, given)
    check_against_manifest(settings, explicit_keys(settings), MANIFEST, "shards")


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["data_config.img_size=[1024, 512]"],
        ["data_config.flip=none"],
        ["data_config.bucket_step="],
        ["seed=7"],
        ["data_config.caption_dropout_rate=0.3"],
    ],
)
def test_agreement(given: list[str]) -> None:
    check(*given)


def test_contradictions_name_both_values() -> None:
    with pytest.raises(InputError) as caught:
        check("data_config.img_size=1024", "data_config.flip=both")
    text = str(caught.value)
    assert "data_config.img_size is [1024], shards were made with [512, 1024]" in text
    assert "data_config.flip is both, shards were made with none" in text
    assert "\n" not in text
