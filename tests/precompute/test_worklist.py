import time
from pathlib import Path

import pytest

from qwen_lora.families.base import TokenCount
from qwen_lora.hashing import canonical_json
from qwen_lora.precompute.existing import ExistingSet
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection, WorkItem
from qwen_lora.precompute.worklist import (
    adopt,
    cut_shards,
    item_from_json,
    item_to_json,
    list_wanted,
    make_work_items,
)
from qwen_lora.shards.cut import shard_samples_limit
from qwen_lora.shards.format import FileEntry, Fingerprint, Geometry, ShardEntry, text_id
from qwen_lora.shards.store import FolderStore

FINGERPRINT = Fingerprint("some-family", {"weights": ["a"]}, {"weights": ["b"]})
SQUARE = Geometry((0, 0, 64, 64), (64, 64))
MIRROR = Geometry((0, 0, 64, 64), (64, 64), flipped=True)


def image(name: str, source: str = "", captions: tuple[str, ...] = ("a cat",)) -> Inspection:
    candidate = Candidate(ImageSource(name, Path("/data") / name), captions, group="cats")
    return Inspection(candidate, source or name, (80, 64))


def item(number: int, size: int = 100) -> WorkItem:
    name = f"{number:032x}"
    return WorkItem(name, name, ("t",), image(name), SQUARE, (5,), (0,), size)


def entry(name: str, count: int) -> ShardEntry:
    return ShardEntry(FileEntry(name, 1, "0"), FileEntry(f"{name}.json", 1, "0"), count)


def ids(shards: list[tuple[WorkItem, ...]]) -> list[list[str]]:
    return [[each.sample_id for each in shard] for shard in shards]


def test_a_duplicate_needs_equal_bytes_captions_and_geometry():
    wanted = list_wanted(
        [
            (image("a.png", "same"), [SQUARE]),
            (image("b.png", "same"), [SQUARE]),
            (image("c.png", "same", ("another caption",)), [SQUARE]),
            (image("d.png", "same"), [MIRROR]),
            (image("e.png", "other"), [SQUARE]),
        ],
        FINGERPRINT,
    )
    assert wanted.twins == {"b.png": "a.png"}
    assert set(wanted.files) == {"a.png", "c.png", "d.png", "e.png"}
    assert len(wanted.samples) == 4


def test_two_resolutions_with_one_bucket_are_one_sample():
    wanted = list_wanted([(image("a.png"), [SQUARE, SQUARE, MIRROR])], FINGERPRINT)
    assert len(wanted.files["a.png"]) == 2
    assert wanted.twins == {}


def test_an_empty_caption_is_named_like_the_empty_prompt():
    wanted = list_wanted([(image("a.png", captions=("",)), [SQUARE])], FINGERPRINT)
    (sample,) = wanted.samples.values()
    assert sample.captions == (" ",)
    assert sample.text_ids == (text_id(" ", FINGERPRINT.text_hash),)


def test_the_work_list_is_in_sample_id_order_whatever_the_scan_order():
    files = [(image(name), [SQUARE, MIRROR]) for name in ("a.png", "b.png", "c.png")]
    counts = {"a cat": TokenCount(7, 1)}

    def work(order):
        samples = list_wanted(order, FINGERPRINT).samples.values()
        return make_work_items(samples, counts, lambda sample, tokens: 10 + tokens[0].tokens)

    forward = work(files)
    assert forward == work(files[::-1])
    assert [each.sample_id for each in forward] == sorted(each.sample_id for each in forward)
    assert {
        (each.token_counts, each.truncated_tokens, each.predicted_bytes) for each in forward
    } == {((7,), (1,), 17)}


@pytest.mark.parametrize(("total", "limit"), [(1, 16), (1024, 16), (1025, 17), (64_000, 1000)])
def test_small_sets_spread_over_ranks(total, limit):
    assert shard_samples_limit(total) == limit


def test_shards_are_cut_by_count_and_by_bytes():
    items = [item(number) for number in range(10)]
    by_count = cut_shards(items, max_bytes=10_000, max_samples=4, frame_bytes=50)
    assert [len(shard) for shard in by_count] == [4, 4, 2]
    by_bytes = cut_shards(items, max_bytes=350, max_samples=100, frame_bytes=50)
    assert [len(shard) for shard in by_bytes] == [3, 3, 3, 1]
    alone = cut_shards(
        [item(0), item(1, 900), item(2)], max_bytes=350, max_samples=9, frame_bytes=50
    )
    assert [len(shard) for shard in alone] == [1, 1, 1]
    assert cut_shards([], max_bytes=1, max_samples=1, frame_bytes=1) == []


PLANNED = [tuple(item(n) for n in range(4)), tuple(item(n) for n in range(4, 8))]


def names(*numbers: int) -> list[str]:
    return [f"{number:032x}" for number in numbers]


def test_a_shard_equal_to_a_planned_one_is_adopted():
    adoption = adopt(PLANNED, [(entry("x", 4), names(4, 5, 6, 7))])
    assert ids(adoption.shards) == [names(0, 1, 2, 3)]
    assert adoption.leftovers == []
    assert [each.tar.name for each in adoption.entries] == ["x"]


def test_equal_shards_go_before_others():
    straddling = (entry("a", 5), names(2, 3, 4, 5, 6))
    adoption = adopt(PLANNED, [straddling, (entry("b", 4), names(0, 1, 2, 3))])
    assert [each.tar.name for each in adoption.entries] == ["b"]


def test_a_shard_of_wanted_samples_is_adopted_and_leaves_the_rest_over():
    adoption = adopt(PLANNED, [(entry("x", 3), names(1, 2, 5))])
    assert adoption.shards == []
    assert [each.sample_id for each in adoption.leftovers] == names(0, 3, 4, 6, 7)


def test_a_shard_with_a_sample_that_is_not_wanted_stays_out():
    adoption = adopt(PLANNED, [(entry("x", 2), names(1, 99)), (entry("y", 0), [])])
    assert adoption.entries == []
    assert adoption.shards == PLANNED


def test_overlapping_shards_are_adopted_once():
    found = [(entry("x", 2), names(0, 1)), (entry("y", 2), names(1, 2))]
    adoption = adopt(PLANNED, found)
    assert [each.tar.name for each in adoption.entries] == ["x"]
    assert adoption == adopt(PLANNED, found[::-1])


def test_work_items_travel_as_json():
    strange = image("a/\udce9\u0007.png", captions=("x", " "))
    travelled = WorkItem("s", "l", ("t", "u"), strange, MIRROR, (5, 6), (0, 1), 9)
    assert item_from_json(item_to_json(travelled)) == travelled
    assert b"udce9" in canonical_json(item_to_json(travelled))


def test_a_large_set_is_compared_in_a_moment():
    """Linear: 50,000 images in a tenth of a second; comparing them in pairs took minutes."""
    count = 50_000
    wanted = list_wanted(
        ((image(str(n), f"{n:064x}"), [SQUARE]) for n in range(count)), FINGERPRINT
    )
    old = {f"{n:032x}": f"{n:064x}" for n in range(count)}  # each with another caption before
    existing = ExistingSet(FolderStore(Path("unused")), sources=old)
    start = time.monotonic()
    assert existing.retired_after(wanted, ()) == old.keys()
    failed = next(iter(wanted.samples))
    assert len(existing.retired_after(wanted, {failed})) == count - 1
    assert time.monotonic() - start < 20
