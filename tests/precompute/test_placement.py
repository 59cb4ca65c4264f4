import pytest

from qwen_lora.precompute.placement import choose_placement

GIB = 1 << 30
TEXT = 16_600_000_000  # a 7B text encoder in bf16, as its files


@pytest.mark.parametrize(
    ("card", "options", "expected"),
    [
        (None, {}, "together"),
        (80 * GIB, {}, "together"),
        (int(23.6 * GIB), {}, "together"),  # what a 24 GB card reports
        (int(19.7 * GIB), {}, "sequential"),
        (12 * GIB, {}, "offload"),
        (12 * GIB, {"quantization": "int8"}, "sequential"),
        (4 * GIB, {"quantization": "nf4"}, "sequential"),  # quantized weights cannot be streamed
        (int(19.7 * GIB), {"dtype": "float32"}, "offload"),
    ],
)
def test_auto_goes_by_the_card(card, options, expected):
    assert choose_placement("auto", card, TEXT, **options) == expected


@pytest.mark.parametrize("setting", ["together", "sequential", "offload"])
def test_a_setting_is_obeyed(setting):
    assert choose_placement(setting, 80 * GIB, TEXT) == setting
    assert choose_placement(setting, None, TEXT) == setting
