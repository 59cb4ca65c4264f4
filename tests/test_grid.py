"""Texts under pictures stay inside their cell, whatever somebody wrote."""

import random

import pytest

from qwen_lora.grid import load_font, wrapped

TEXTS = {
    "words": "a close-up photo of a tabby cat looking to the side " * 80,
    "one long word": "A" * 4000,
    "narrow letters": "il." * 1000,
    "wide letters": "WM@" * 50 + " " + "W" * 30,
    "another direction": "שלום עולם זה כיתוב בעברית " * 20,
    "no glyphs": "寺の屋根" * 200,
    "blanks": " \n\t ",
    "short": "cat",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("size", "width", "lines"), [(10, 144, 2), (12, 224, 3), (28, 40, 1)])
def test_lines_fit_the_width(text: str, size: int, width: int, lines: int) -> None:
    font = load_font(size)
    found = wrapped(text, font, width, lines)
    assert 1 <= len(found) <= lines
    assert all(font.getlength(line) <= width for line in found)
    whole = " ".join(text.split())
    told = found[-1].removesuffix("...")
    cut = told != found[-1]
    shown = "".join([*found[:-1], told]).replace(" ", "")
    assert whole.replace(" ", "").startswith(shown)
    assert cut or shown == whole.replace(" ", "")


def test_lines_break_between_words(fault_seed: int) -> None:
    random.seed(fault_seed)
    words = ["".join(random.choices("abcdefgmw", k=random.randint(1, 9))) for _ in range(60)]
    found = wrapped(" ".join(words), load_font(12), 200, 100)
    assert " ".join(found).split() == words
