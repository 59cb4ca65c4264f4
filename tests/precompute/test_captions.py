"""From caption bytes to captions."""

import json

import pytest

from qwen_lora.config.kohya import parse_kohya
from qwen_lora.config.schema import DataConfig
from qwen_lora.precompute.captions import (
    CAPTION_MAX_BYTES,
    CAPTIONS_MAX,
    STORED_MAX_BYTES,
    CaptionError,
    read_sidecar,
)


def captions(content: bytes | str, kind: str = "txt", **settings: object) -> tuple[str, ...]:
    raw = content.encode() if isinstance(content, str) else content
    return read_sidecar(kind, raw, DataConfig(**settings))


def reason(content: bytes | str, kind: str = "txt", **settings: object) -> str:
    with pytest.raises(CaptionError) as error:
        captions(content, kind, **settings)
    return error.value.reason


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("join", ("a cat on a mat",)), ("variants", ("a cat", "on a mat")), ("first", ("a cat",))],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_caption_lines(mode: str, expected: tuple[str, ...], end: str) -> None:
    text = f"{end} a cat {end}{end}\ton a mat{end}"
    assert captions(text, caption_lines=mode) == expected


def test_other_separators_are_no_line_ends() -> None:
    assert captions("a\u2028b\x0bc", caption_lines="variants") == ("a\u2028b\x0bc",)


def test_text_is_not_normalised() -> None:
    assert captions("cafe\u0301") != captions("caf\u00e9")


def test_byte_order_mark_is_dropped() -> None:
    assert captions(b"\xef\xbb\xbfa cat") == ("a cat",)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"a caf\xe9", "txt"),
        ("a cat".encode("utf-16"), "txt"),
        (b"\xff\xfea\x00", "caption"),
        (b"a\x00cat", "txt"),
        (b"\xed\xa0\x80", "txt"),
        (rb'{"text": "a\u0000"}', "json"),
        (rb'{"text": "a\ud800"}', "json"),
        (b'{"text": "caf\xe9"}', "json"),
    ],
)
def test_bad_encoding(content: bytes, kind: str) -> None:
    assert reason(content, kind) == "bad_encoding"


def test_long_captions_are_refused() -> None:
    long = "x" * (STORED_MAX_BYTES - 10)
    assert captions(long) == (long,)
    assert reason("x" * STORED_MAX_BYTES) == "caption_too_long"
    assert reason("\U0001f600" * (STORED_MAX_BYTES // 12)) == "caption_too_long"  # escaped in JSON
    assert reason("x" * (CAPTION_MAX_BYTES + 1)) == "caption_too_long"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"caption": "a", "prompt": "b", "text": "c"}, ("a",)),
        ({"prompt": "b", "text": "c"}, ("b",)),
        ({"caption": None, "text": "c", "tags": [1]}, ("c",)),
        ({"text": [" a ", "b"]}, ("a", "b")),
    ],
)
def test_json(value: object, expected: tuple[str, ...]) -> None:
    assert captions(json.dumps(value), "json") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "caption_unreadable"),
        ("[" * 100_000, "caption_unreadable"),
        ('["a"]', "caption_unreadable"),
        ('{"text": 3}', "caption_unreadable"),
        ('{"text": ["a", 3]}', "caption_unreadable"),
        ('{"tags": "a"}', "caption_missing"),
        ('{"text": null}', "caption_missing"),
        ('{"text": []}', "caption_empty"),
        ('{"text": ["", " "]}', "caption_empty"),
    ],
)
def test_json_without_a_caption(content: str, expected: str) -> None:
    assert reason(content, "json") == expected


@pytest.mark.parametrize("mode", ["join", "variants", "first"])
@pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff"])
def test_empty_captions(content: str, mode: str) -> None:
    assert reason(content, caption_lines=mode) == "caption_empty"
    assert captions(content, caption_lines=mode, empty_caption="unconditional") == ("",)
    assert captions(content, caption_lines=mode, trigger_word="sks") == ("sks",)


def test_trigger_word_is_put_before_every_caption() -> None:
    found = captions("a cat\na dog", caption_lines="variants", trigger_word=" sks ")
    assert found == ("sks, a cat", "sks, a dog")


def test_a_pointer_of_git_lfs_is_no_caption() -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    assert reason(pointer) == "caption_unreadable"


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("10_cat", (10.0, "cat")),
        ("3_cat_sitting dog", (3.0, "cat_sitting dog")),
        ("cat", None),
        ("10_", None),
        ("_cat", None),
        ("-1_cat", None),
        ("1.5_cat", None),
        ("20240131_trip", None),
        ("\u0663_cat", None),
        ("", None),
    ],
)
def test_kohya_folder_names(group: str, expected: tuple[float, str] | None) -> None:
    assert parse_kohya(group) == expected


def test_more_captions_than_a_record_holds_are_refused() -> None:
    lines = [f"caption {number}" for number in range(CAPTIONS_MAX)]
    assert len(captions("\n".join(lines), caption_lines="variants")) == CAPTIONS_MAX
    assert reason("\n".join([*lines, "more"]), caption_lines="variants") == "too_many_captions"


def test_the_largest_captions_fit_a_record() -> None:
    """What passes here is accepted by the reader: JSON member and tensor header included."""
    import torch

    from qwen_lora.shards.format import RecordMeta
    from qwen_lora.shards.record import RecordShape, decode_meta, decode_tensors, encode_record

    text = "y" * (STORED_MAX_BYTES // CAPTIONS_MAX - 4)
    many = captions("\n".join([text] * CAPTIONS_MAX), caption_lines="variants")
    size = (10**6, 10**6)
    meta = RecordMeta(
        list(many), "n" * 4096, "0" * 64, size, (0, 0, *size), False, (64, 64), [9] * 256, "g"
    )
    tensors = {"latents": torch.zeros(16, 8, 8, dtype=torch.float16)}
    for index in range(CAPTIONS_MAX):
        tensors[f"prompt_embeds.{index}"] = torch.zeros(1024, 8, dtype=torch.bfloat16)
        tensors[f"prompt_mask.{index}"] = torch.ones(1024, dtype=torch.bool)
    json_member, tensor_member = encode_record(meta, tensors)
    assert decode_meta(json_member) == meta
    shape = RecordShape(("latents",), (16, 8, 8), (1024,) * CAPTIONS_MAX, 8)
    assert len(decode_tensors(tensor_member, shape)) == 1 + 2 * CAPTIONS_MAX
