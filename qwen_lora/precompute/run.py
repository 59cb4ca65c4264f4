"""Stage 1 from beginning to end: a folder of captioned images becomes a shard set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.hashing import canonical_json
from qwen_lora.models import ModelFolder, resolve_model
from qwen_lora.posix import exclusive_lock, make_folder, write_atomic
from qwen_lora.precompute.fingerprint import make_fingerprint
from qwen_lora.precompute.nodes import (
    check_same_encoders,
    check_same_start,
    one_place,
    resolve_by_turns,
)
from qwen_lora.precompute.order import (
    Order,
    entry_from_json,
    entry_to_json,
    failures_from_json,
    failures_to_json,
)
from qwen_lora.precompute.output import (
    folder_option,
    local_folder,
    local_state,
    open_output,
)
from qwen_lora.precompute.plan import DEFAULT_MODEL, ENCODER_PARTS, dataset_folder
from qwen_lora.precompute.report import PrecomputeSummary
from qwen_lora.precompute.stopping import stop_on_signals
from qwen_lora.precompute.sync import Sync
from qwen_lora.precompute.world import World
from qwen_lora.precompute.write import output_errors
from qwen_lora.progress import Progress
from qwen_lora.redact import redact_values
from qwen_lora.shards.store import Store, own_folder
from qwen_lora.shards.writer import sweep_temporaries

if TYPE_CHECKING:
    from qwen_lora.precompute.encode import Encoded, Station

__all__ = ["PrecomputeSummary", "precompute"]

CONTINUE = "finished shards are kept, the same command continues once it is put right"


def precompute(
    settings: Settings, dry_run: bool = False, sync: bool = False, yes: bool = False
) -> PrecomputeSummary:
    """Encode what is missing of a dataset into the shard set `settings.shards_dir`.

    Prints progress to stderr and a summary to stdout. Under `accelerate launch` or torchrun all
    processes call it and get the same summary. A bad image is reported and left out; `dry_run` only
    tells what would be done and writes nothing. `sync` retires the samples of images that are gone
    from the dataset; above 10 % of the set only with `yes`.
    Raises InputError (settings, dataset, model, another set in the folder, too little space),
    Stopped (a signal; finished shards are kept) and QwenLoraError (another process, the disk).
    """
    asked = Sync(sync, yes)
    if dry_run:
        from qwen_lora.precompute.dry_run import preview

        with _folder_errors(settings):
            return preview(settings, asked)
    world = World.from_environment()
    with (
        stop_on_signals(),
        world.lifeline.guard(),
        output_errors(local_folder(settings), QwenLoraError, CONTINUE),
        open_output(settings) as store,
    ):
        model = _resolve(store, settings, world)
        with _locked(store, settings, world) as local:
            summary = _run(settings, model, store, local, world, asked)
    if world.first:
        print("\n".join(summary.lines()), flush=True)
    return summary


def _run(
    settings: Settings, model: ModelFolder, store: Store, local: Path, world: World, sync: Sync
) -> PrecomputeSummary:
    """Rank 0 plans and publishes, all encode."""
    if not world.first:
        order = Order.from_json(world.share())
        if world.leads_other_node:
            mine = make_fingerprint(model, settings)
            check_same_encoders(mine, order.fingerprint, world)
        done, _ = _encode(order, settings, model, store, local, world)
        world.gather(_answer(done))
        return PrecomputeSummary(**world.share())
    from qwen_lora.precompute.lead import Lead

    with _folder_errors(settings):
        lead = Lead(settings, model, store, local, sync)
        order = lead.plan()
    world.share(order.to_json() if world.size > 1 else None)
    done, station = _encode(order, settings, model, store, local, world)
    summary = lead.publish(_join(done, world.gather(_answer(done))), station)
    world.share(asdict(summary))
    return summary


def _folder_errors(settings: Settings) -> AbstractContextManager[None]:
    """A folder that cannot be used is the user's to put right."""
    option = folder_option(settings)
    advice = f"name a folder that you may write to, with room on its disk, as {option}"
    return output_errors(local_folder(settings), InputError, advice)


def _resolve(store: Store, settings: Settings, world: World) -> ModelFolder:
    """What is plainly wrong is said before anything is downloaded or made."""
    name = settings.pretrained_model_name_or_path or DEFAULT_MODEL
    dataset_folder(settings)
    if world.first:
        store.check_permission()
    check_same_start(world, settings)
    return resolve_by_turns(world, lambda: resolve_model(name, ENCODER_PARTS))


@contextmanager
def _locked(store: Store, settings: Settings, world: World) -> Iterator[Path]:
    """SHARDS/.local, held by rank 0 for all; what a killed run left in it is swept."""
    local = local_state(settings)
    if not world.first:
        with one_place(world, store, settings):
            yield local
        return
    with ExitStack() as held:
        with _folder_errors(settings):
            if store.is_remote:
                make_folder(local)  # the user's own choice, a link too
            else:
                own_folder(local)
            held.enter_context(exclusive_lock(local / "lock", f"the shard set {store.label}"))
            sweep_temporaries(store)
            values = redact_values(settings.model_dump(mode="json"))
            write_atomic(local / "settings.json", canonical_json(values))
        held.enter_context(one_place(world, store, settings))
        yield local


def _encode(
    order: Order,
    settings: Settings,
    model: ModelFolder,
    store: Store,
    local: Path,
    world: World,
) -> tuple[Encoded, Station]:
    """This rank's shards. Without any, no encoder is loaded."""
    from qwen_lora.precompute.encode import Encoded, Share, Station, encode_share
    from qwen_lora.precompute.encoders import Encoders, encoding_mode, pick_device, placement_on

    device = pick_device(world.local_rank)
    placement = placement_on(device, model, settings)
    station = Station(
        store=store,
        local=local,
        settings=settings,
        fingerprint=order.fingerprint,
        made_by=order.made_by,
        encoders=Encoders(model, settings, device, placement, quiet=not world.first),
        quiet=not world.first,
        check=world.check,
    )
    share = Share(
        shards=order.shards[world.rank :: world.size],
        known_failures=order.known_failures,
        unconditional=order.unconditional and world.first,
        prompts=order.prompts if world.first else (),
        stored=order.stored,
    )
    if not share.shards:
        return Encoded(), station
    total = sum(map(len, share.shards))
    with (
        encoding_mode(settings.encode_threads),
        Progress("encoding", total, "samples", quiet=not world.first) as progress,
    ):
        return encode_share(share, station, progress), station


def _answer(done: Encoded) -> dict[str, Any]:
    return {
        "entries": [entry_to_json(entry) for entry in done.entries],
        "sample_ids": done.sample_ids,
        "failures": failures_to_json(done.failures),
    }


def _join(done: Encoded, answers: list[dict[str, Any]]) -> Encoded:
    """All ranks' work as one; what belongs to no shard is rank 0's own."""
    from qwen_lora.precompute.encode import Encoded

    joined = Encoded(unconditional=done.unconditional, prompts=done.prompts)
    for answer in answers:
        joined.entries += [entry_from_json(entry) for entry in answer["entries"]]
        joined.sample_ids += answer["sample_ids"]
        joined.failures.update(failures_from_json(answer["failures"]))
    return joined
