"""Embeddings equal `QwenImagePipeline.encode_prompt`; a caption is never more than text."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_lora.errors import InputError
from qwen_lora.families.base import EncodedCaption
from qwen_lora.models import ModelFolder

CPU = torch.device("cpu")
CAPTIONS = [
    "a red owl",
    " ",
    "",
    "Ein Übermut: 12 Dinge, cafe\u0301 — 猫🦉!",
    "two\n\nparagraphs\n\n\nand a {brace}\t",
    "\u0301starts with a combining accent",
    "a < b |> c <| d im_start",
    "word " * 300,
]
NEWLINE = "\n\nan owl"
LONG = "x y " * 900  # 1,800 tokens and more
SPECIAL = "a <|im_end|>\n<|im_start|>assistant <|image_pad|> <tool_call> <|endoftext|> dog"


@pytest.fixture(scope="module")
def encoder(model: ModelFolder) -> Any:
    return model.family.load_prompt_encoder(model, device=CPU, dtype=torch.float32)


def reference(pipeline: Any, captions: list[str]) -> list[torch.Tensor]:
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(captions)
    if mask is None:
        return list(embeds)
    return [row[valid.bool()] for row, valid in zip(embeds, mask, strict=True)]


def assert_equal(encoded: list[EncodedCaption], expected: list[torch.Tensor], atol: float) -> None:
    assert len(encoded) == len(expected)
    for caption, embeds in zip(encoded, expected, strict=True):
        assert caption.prompt_mask.shape == (len(embeds),) and caption.prompt_mask.all()
        torch.testing.assert_close(caption.prompt_embeds, embeds, atol=atol, rtol=0)


def test_a_mixed_batch_equals_the_pipeline(encoder: Any, pipeline: Any) -> None:
    assert_equal(encoder.encode(CAPTIONS), reference(pipeline, CAPTIONS), 1e-5)


@pytest.mark.parametrize("caption", [*CAPTIONS, LONG])
def test_one_caption_equals_the_pipeline(caption: str, encoder: Any, pipeline: Any) -> None:
    assert_equal(encoder.encode([caption]), reference(pipeline, [caption]), 1e-5)


def test_a_caption_does_not_depend_on_its_batch(encoder: Any) -> None:
    together = encoder.encode(CAPTIONS)
    alone = [encoder.encode([caption])[0].prompt_embeds for caption in CAPTIONS]
    assert_equal(together, alone, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(
    side: str, encoder: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.tokenizer, "padding_side", side)
    assert_equal(encoder.encode(CAPTIONS[:4]), reference(pipeline, CAPTIONS[:4]), 2e-5)


@pytest.fixture(scope="module")
def whole(model: ModelFolder) -> Any:
    """The encoder that computes the template's beginning for every caption."""
    return model.family.load_prompt_encoder(
        model, device=CPU, dtype=torch.float32, prefix_cache=False
    )


def worst(found: list[EncodedCaption], expected: list[EncodedCaption]) -> float:
    """Largest difference as a part of the largest value."""
    pairs = [
        (a.prompt_embeds.float(), b.prompt_embeds.float())
        for a, b in zip(found, expected, strict=True)
    ]
    assert all(a.shape == b.shape for a, b in pairs)
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


BATCHES = [[*CAPTIONS, LONG], ["a red owl"], [""], [LONG], [NEWLINE, "a red owl"]]


@pytest.mark.parametrize("captions", BATCHES)
def test_the_prefix_cache_changes_rounding_alone(
    captions: list[str], encoder: Any, whole: Any
) -> None:
    assert worst(encoder.encode(captions), whole.encode(captions)) < 2e-6


# Quantised layers round what they are given together: int8 by row, after outlying columns.
@pytest.mark.parametrize(
    ("dtype", "kind", "most"),
    [
        (torch.bfloat16, "none", 0.02),
        (torch.float32, "int8", 0.05),
        (torch.float32, "nf4", 1e-5),
    ],
)
def test_the_prefix_cache_in_other_arithmetic(
    dtype: torch.dtype, kind: str, most: float, model: ModelFolder
) -> None:
    if kind != "none":
        pytest.importorskip("bitsandbytes")
    cached, whole = (
        model.family.load_prompt_encoder(
            model, device=CPU, dtype=dtype, quantization=kind, prefix_cache=cache
        )
        for cache in (True, False)
    )
    error = worst(cached.encode(CAPTIONS), whole.encode(CAPTIONS))
    print(f"{dtype} {kind}: {error:.1e}")
    assert error < most


def tokens_seen(encoder: Any, captions: list[str]) -> int:
    seen = []
    hook = encoder._module.embed_tokens.register_forward_hook(
        lambda module, given, output: seen.append(given[0].numel())
    )
    encoder.encode(captions)
    hook.remove()
    return sum(seen)


def test_no_padding_and_no_template_is_computed(
    model: ModelFolder, encoder: Any, whole: Any
) -> None:
    captions = ["a", LONG, "a red owl"]
    counts = [count.tokens for count in model.family.load_tokenizer(model).count(captions)]
    assert tokens_seen(encoder, captions) == sum(counts)
    assert tokens_seen(whole, captions) == sum(counts) + 3 * 34


def test_a_line_break_in_front_joins_the_templates(
    model: ModelFolder, encoder: Any, pipeline: Any
) -> None:
    """Then the first 34 tokens are not the usual ones, and nothing computed before is used."""
    usual, joined = model.family.load_tokenizer(model).ids(["x", NEWLINE])
    assert usual[:33] == joined[:33] and usual[33] != joined[33]
    assert_equal(encoder.encode([NEWLINE]), reference(pipeline, [NEWLINE]), 1e-5)


def test_truncation(model: ModelFolder, encoder: Any, pipeline: Any) -> None:
    (expected,) = reference(pipeline, [LONG])
    (encoded,) = encoder.encode([LONG])
    assert encoded.prompt_embeds.shape == expected.shape == (1024, 64)
    template = pipeline.prompt_template_encode
    (count,) = model.family.load_tokenizer(model).count([LONG])
    whole = len(pipeline.tokenizer(template.format(LONG)).input_ids) - 34
    assert (count.tokens, count.truncated) == (1024, whole - 1024)
    # 1,019 tokens of caption and the template's last 5 just fit.
    just_fits = "1" * 1019
    counts = model.family.load_tokenizer(model).count([just_fits, just_fits + "2"])
    assert [(c.tokens, c.truncated) for c in counts] == [(1024, 0), (1024, 1)]


def test_counts_equal_what_is_encoded(model: ModelFolder, encoder: Any) -> None:
    captions = [*CAPTIONS, LONG, SPECIAL]
    counts = model.family.load_tokenizer(model).count(captions)
    encoded = encoder.encode(captions)
    assert [c.tokens for c in counts] == [len(e.prompt_embeds) for e in encoded]
    assert [c.truncated > 0 for c in counts] == [caption == LONG for caption in captions]


def test_special_tokens_in_a_caption_are_text(model: ModelFolder, pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    (ids,) = model.family.load_tokenizer(model).ids([SPECIAL])
    added = set(tokenizer.get_added_vocab().values())
    template = tokenizer(pipeline.prompt_template_encode.format("")).input_ids
    assert [i for i in ids if i in added] == [i for i in template if i in added]
    assert tokenizer.decode(ids) == pipeline.prompt_template_encode.format(SPECIAL)
    assert tokenizer(pipeline.prompt_template_encode.format(SPECIAL)).input_ids != ids


def test_bfloat16_equals_the_pipeline_in_bfloat16(model: ModelFolder, tiny_model: Path) -> None:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model), dtype=torch.bfloat16)
    encoder = model.family.load_prompt_encoder(model, device=CPU, dtype=torch.bfloat16)
    encoded = encoder.encode(CAPTIONS[:1])
    assert encoded[0].prompt_embeds.dtype == torch.bfloat16
    assert_equal(encoded, reference(pipeline, CAPTIONS[:1]), 0.02)


def test_offload_changes_nothing(model: ModelFolder, encoder: Any) -> None:
    streamed = model.family.load_prompt_encoder(
        model, device=CPU, dtype=torch.float32, offload=True
    )
    pairs = zip(streamed.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True)
    assert all(torch.equal(a.prompt_embeds, b.prompt_embeds) for a, b in pairs)


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.1), ("nf4", 0.5)])
def test_quantized(kind: str, worst: float, model: ModelFolder, encoder: Any) -> None:
    pytest.importorskip("bitsandbytes")
    small = model.family.load_prompt_encoder(
        model, device=CPU, dtype=torch.float32, quantization=kind
    )
    layer = small._module.layers[0].mlp.down_proj
    assert layer.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert small._module.embed_tokens.weight.dtype == torch.float32
    exact = encoder.encode(CAPTIONS[:1])[0].prompt_embeds
    error = (small.encode(CAPTIONS[:1])[0].prompt_embeds - exact).norm() / exact.norm()
    assert 1e-4 < error < worst


def test_wrong_choices(model: ModelFolder, encoder: Any) -> None:
    load = model.family.load_prompt_encoder
    with pytest.raises(InputError, match="unknown text encoder quantization 'int3'"):
        load(model, device=CPU, dtype=torch.float32, quantization="int3")
    with pytest.raises(InputError, match="choose one of the two"):
        load(model, device=CPU, dtype=torch.float32, quantization="int8", offload=True)
    with pytest.raises(InputError, match="no captions"):
        encoder.encode([])


def test_only_the_text_model_is_loaded(encoder: Any, pipeline: Any) -> None:
    assert encoder.text_width == 64
    names = {name for name, _ in encoder._module.named_parameters()}
    expected = pipeline.text_encoder.model.language_model
    assert names == {name for name, _ in expected.named_parameters()}


def _copy(model: ModelFolder, folder: Path) -> ModelFolder:
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(model.component(name), folder / name)
    return dataclasses.replace(model, path=folder)


def test_weights_named_either_way(model: ModelFolder, encoder: Any, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    other = _copy(model, tmp_path / "new")
    path = other.component("text_encoder") / "model.safetensors"
    weights = load_file(path)
    assert any(name.startswith("visual.") for name in weights)  # the published layout

    def rename(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1)

    save_file({rename(name): value for name, value in weights.items()}, path)
    renamed = other.family.load_prompt_encoder(other, device=CPU, dtype=torch.float32)
    exact = encoder.encode(CAPTIONS[:2])
    for a, b in zip(renamed.encode(CAPTIONS[:2]), exact, strict=True):
        assert torch.equal(a.prompt_embeds, b.prompt_embeds)
    assert other.family.encoder_facts(dataclasses.replace(model)) == model.family.encoder_facts(
        model
    )


def test_a_flat_config_as_published(model: ModelFolder, encoder: Any, tmp_path: Path) -> None:
    other = _copy(model, tmp_path / "flat")
    path = other.component("text_encoder") / "config.json"
    nested = json.loads(path.read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    text.pop("layer_types")
    flat = {**nested, **text, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["vision_config"] = {**flat["vision_config"], "model_type": "qwen2_5_vl"}
    flat["torch_dtype"] = "bfloat16"
    path.write_text(json.dumps(flat))
    shutil.copytree(model.component("vae"), tmp_path / "flat" / "vae")
    assert model.family.encoder_facts(other) == model.family.encoder_facts(model)
    encoded = other.family.load_prompt_encoder(other, device=CPU, dtype=torch.float32)
    exact = encoder.encode(CAPTIONS[:2])
    for a, b in zip(encoded.encode(CAPTIONS[:2]), exact, strict=True):
        assert torch.equal(a.prompt_embeds, b.prompt_embeds)


def test_a_tokenizer_as_published(model: ModelFolder, tmp_path: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json with the added tokens; no tokenizer.json."""
    other = _copy(model, tmp_path / "slow")
    folder = other.component("tokenizer")
    facts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(facts["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in facts["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in facts["added_tokens"]
    }
    specials = [token["content"] for token in facts["added_tokens"] if token["special"]]
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [t for t in specials if t != "<|endoftext|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    captions = [*CAPTIONS, LONG, SPECIAL]
    expected = model.family.load_tokenizer(model).ids(captions)
    assert other.family.load_tokenizer(other).ids(captions) == expected


def test_another_tokenizer_is_refused(model: ModelFolder, tmp_path: Path) -> None:
    other = _copy(model, tmp_path / "other")
    path = other.component("tokenizer") / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["merges"] = facts["model"]["merges"][:50]
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="tokens before the caption instead of 34"):
        other.family.load_tokenizer(other)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer/tokenizer.json", "{"),
        ("tokenizer/tokenizer.json", '{"version": "1.0"}'),
        ("text_encoder/config.json", '{"text_config": {"num_hidden_layers": "two"}}'),
    ],
)
def test_damaged_files_are_named_in_one_line(
    file: str, content: str, model: ModelFolder, tmp_path: Path
) -> None:
    other = _copy(model, tmp_path / "other")
    (other.path / file).write_text(content)
    with pytest.raises(InputError, match=r"cannot be loaded, its files are damaged") as caught:
        other.family.load_prompt_encoder(other, device=CPU, dtype=torch.float32)
    assert str(other.component(file.split("/")[0])) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_facts_are_json_and_follow_what_shapes_embeddings(
    model: ModelFolder, tmp_path: Path
) -> None:
    other = _copy(model, tmp_path / "changed")
    shutil.copytree(model.component("vae"), other.path / "vae")
    before = model.family.encoder_facts(model)
    assert json.loads(json.dumps(before)) == before == model.family.encoder_facts(other)
    assert before["text"]["max_tokens"] == 1024 and before["text"]["dropped_tokens"] == 34
    assert str(model.path) not in json.dumps(before)
    path = other.component("text_encoder") / "config.json"
    config = json.loads(path.read_text())
    config["transformers_version"] = "9.9"  # shapes nothing
    path.write_text(json.dumps(config))
    assert model.family.encoder_facts(other) == before
    config["text_config"]["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(config))
    after = model.family.encoder_facts(other)
    assert after["text"] != before["text"] and after["vae"] == before["vae"]
