"""Manifests: what a generation consists of, checked from its own name down."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.shards.format import (
    FORMAT_MAJOR,
    NAME_HEX,
    FileEntry,
    Fingerprint,
    Manifest,
    ShardEntry,
)
from qwen_lora.shards.record import LATENT_NAMES
from qwen_lora.shards.safe import parse_json, printable
from qwen_lora.shards.sidecar import Sidecar, decode_fingerprint, decode_sidecar
from qwen_lora.shards.store import Place, Store, opened_store

MANIFEST = "manifest.json"
MANIFEST_MAX_BYTES = 64 << 20  # a million samples need about 4 MiB
LISTED_MAX_BYTES = 1 << 30  # of one small listed file
KNOWN_FEATURES: frozenset[str] = frozenset()
_NAMES = {
    "tar": r"shard-[0-9a-f]{12}\.tar",
    "sidecar": r"shard-[0-9a-f]{12}\.json",
    "unconditional": r"unconditional-[0-9a-f]{12}\.safetensors",
    "previews": r"previews-[0-9a-f]{12}\.safetensors",
    "rgb": r"rgb-[0-9a-f]{12}\.json",
    "retired": r"retired-[0-9a-f]{12}\.json",
    "previous": r"manifest-[0-9a-f]{12}\.json",
}


def content_name(kind: str, sha256: str, suffix: str) -> str:
    return f"{kind}-{sha256[:NAME_HEX]}{suffix}"


def is_name_of_format(name: str) -> bool:
    """Whether a file is named as one that a generation lists, or as a generation."""
    return any(re.fullmatch(pattern, name) for pattern in _NAMES.values())


# ---- bytes ---------------------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    return canonical_json(asdict(manifest))


def decode_manifest(data: bytes, what: str) -> Manifest:
    """Raises InputError for a format this version does not know, ShardError for anything broken."""
    value = parse_json(data, what, MANIFEST_MAX_BYTES)
    if not isinstance(value, dict) or type(value.get("format_major")) is not int:
        raise ShardError(f"{what}: not a shard set's manifest")
    _check_version(value, what)
    try:
        shards = tuple(
            ShardEntry(
                _file(entry["tar"], "tar"), _file(entry["sidecar"], "sidecar"), entry["samples"]
            )
            for entry in value["shards"]
        )
        fields = {name: value[name] for name in Manifest.__dataclass_fields__ if name in value}
        fields["unconditional"] = _file(value["unconditional"], "unconditional")
        for name in ("previews", "rgb", "retired"):
            fields[name] = None if value[name] is None else _file(value[name], name)
        if value["previous"] is not None:
            _check_name(value["previous"], "previous")
        fields |= {
            "fingerprint": decode_fingerprint(value["fingerprint"]),
            "shards": shards,
            "required_features": tuple(value["required_features"]),
        }
        manifest = Manifest(**fields)
        _check_types(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{what}: not a manifest of format {FORMAT_MAJOR} ({error})") from None
    return manifest


def _check_version(value: dict[str, Any], what: str) -> None:
    major, minor = value["format_major"], value.get("format_minor")
    if major != FORMAT_MAJOR:
        raise InputError(
            f"{what} has shard format {major}.{minor}; this version reads {FORMAT_MAJOR}.x: "
            "it needs a newer qwen-lora"
        )
    features = value.get("required_features", [])
    if type(minor) is not int or not _texts(features):
        raise ShardError(f"{what}: not a manifest of format {FORMAT_MAJOR} (format or features)")
    unknown = sorted(set(features) - KNOWN_FEATURES)
    if unknown:
        raise InputError(
            f"{what} needs {printable(', '.join(unknown))}, which this version of qwen-lora lacks: "
            "it needs a newer one"
        )


def _file(value: Any, kind: str) -> FileEntry:
    entry = FileEntry(**value)
    _check_name(entry.name, kind)
    most = 1 << 48 if kind == "tar" else LISTED_MAX_BYTES
    if type(entry.bytes) is not int or not 0 < entry.bytes <= most or not _is_sha256(entry.sha256):
        raise ValueError(f"entry of {entry.name}")
    if entry.name.split("-")[1][:NAME_HEX] != entry.sha256[:NAME_HEX] and kind != "sidecar":
        raise ValueError(f"{entry.name} is not named by its content {entry.sha256[:NAME_HEX]}")
    return entry


def _check_name(name: Any, kind: str) -> None:
    """Only the names this format gives: no path, no URL, no pipe."""
    if not isinstance(name, str) or not re.fullmatch(_NAMES[kind], name):
        raise ValueError(f"{name!r} is not the name of a {kind} file")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _check_types(manifest: Manifest) -> None:
    naturals = (manifest.latent_channels, manifest.latent_scale, manifest.text_width)
    if not all(type(number) is int and 0 < number < 1 << 20 for number in naturals):
        raise ValueError(f"latent channels, latent scale and text width {naturals}")
    if manifest.posterior not in LATENT_NAMES:
        raise ValueError(f"posterior {manifest.posterior!r}")
    if not isinstance(manifest.model, dict) or not isinstance(manifest.recipe, dict):
        raise ValueError("model or recipe is not an object")
    histograms = manifest.histograms
    if not isinstance(histograms, dict) or not all(
        map(_counts, (manifest.counts, *histograms.values()))
    ):
        raise ValueError("counts or histograms are not numbers by name")
    if not all(name.isdecimal() and len(name) < 12 for name in histograms.get("tokens", ())):
        raise ValueError("a token length is not a number")
    names = [entry.tar.name for entry in manifest.shards]
    if any(Path(entry.sidecar.name).stem != Path(entry.tar.name).stem for entry in manifest.shards):
        raise ValueError("a sidecar that is not named as its shard")
    if len(set(names)) != len(names):
        raise ValueError("a shard is listed twice")
    if not all(type(entry.samples) is int and entry.samples > 0 for entry in manifest.shards):
        raise ValueError("a shard without samples")


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(count) is int and 0 <= count < 1 << 62 for count in value.values()
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


# ---- reading -------------------------------------------------------------------------------------


def load_manifest(place: Place, name: str = MANIFEST) -> tuple[Manifest, str]:
    """A generation and the name of its own file `manifest-<hash>.json`.

    Raises InputError when there is no shard set or the asked generation is gone, ShardError when a
    manifest's bytes are not those its name promises.
    """
    with opened_store(place) as store:
        data = _manifest_bytes(store, name)
        what = store.where(name)
        generation = content_name("manifest", sha256_hex(data), ".json")
        if name != MANIFEST and name != generation:
            raise ShardError(f"{what} is damaged: its content belongs to {generation}")
        try:
            manifest = decode_manifest(data, what)
            if name == MANIFEST and not _has_generation(store, generation):
                raise ShardError(
                    f"{what} is damaged or was edited: there is no {generation}, which it is a "
                    "copy of"
                )
        except ShardError as error:
            if name != MANIFEST:
                raise
            raise ShardError(f"{error}; {_how_to_restore(store)}") from None
        return manifest, generation


def _how_to_restore(store: Store) -> str:
    """What to do about a damaged `manifest.json`: of the generations that are kept and sound, the
    newest is the one that none of them follows."""
    followed = {}
    for name in filter(re.compile(_NAMES["previous"]).fullmatch, store.names() or ()):
        try:
            followed[name] = load_manifest(store, name)[0].previous
        except (QwenLoraError, OSError):
            continue
    newest = followed.keys() - set(followed.values())
    if len(newest) == 1:
        return f"copy {newest.pop()} over it"
    return "copy it again from its source"


def _manifest_bytes(store: Store, name: str) -> bytes:
    if name != MANIFEST and not re.fullmatch(_NAMES["previous"], name):
        raise InputError(f"{name!r} is not a generation: give the name of a manifest-*.json")
    if not store.exists():
        raise InputError(
            f"no shard set at {store.label}: a set is a folder or a URL; name it, or run "
            "`qwen-lora precompute`"
        )
    try:
        return store.read(name, MANIFEST_MAX_BYTES)
    except FileNotFoundError:
        pass
    if name != MANIFEST:
        raise InputError(f"{store.label} has no generation {name}: it was pruned, or the set moved")
    unfinished = any(map(re.compile(_NAMES["tar"]).fullmatch, store.names() or ()))
    if unfinished:
        raise InputError(
            f"{store.label} holds an unfinished precompute ({name} is missing): run `qwen-lora "
            "precompute` to the end"
        )
    raise InputError(
        f"{store.label} holds no manifest ({name} is missing), so it is no shard set: name the "
        "folder that `qwen-lora precompute` wrote"
    )


def _has_generation(store: Store, name: str) -> bool:
    try:
        store.read(name, MANIFEST_MAX_BYTES)
    except FileNotFoundError:
        return False
    return True


def damaged_generations(place: Place) -> list[str]:
    """Names of kept generations whose content is not what their name promises; none where a store
    cannot list its files."""
    damaged = []
    with opened_store(place) as store:
        for name in filter(re.compile(r"manifest-.*\.json").fullmatch, store.names() or ()):
            try:
                data = store.read(name, MANIFEST_MAX_BYTES)
                sound = content_name("manifest", sha256_hex(data), ".json") == name
            except (ShardError, OSError):
                sound = False
            if not sound:
                damaged.append(name)
    return damaged


def read_listed(place: Place, entry: FileEntry) -> bytes:
    """A small listed file (sidecar, unconditional, ...), checked against its hash."""
    with opened_store(place) as store:
        data = store.read_listed(entry)
        if sha256_hex(data) != entry.sha256:
            raise ShardError(
                f"{store.where(entry.name)} is damaged: sha256 {sha256_hex(data)[:NAME_HEX]}, the "
                f"manifest says {entry.sha256[:NAME_HEX]}; copy it again from its source"
            )
        return data


def read_sidecar(place: Place, entry: ShardEntry) -> Sidecar:
    """A shard's sidecar, checked against the manifest's hash and count."""
    with opened_store(place) as store:
        what = store.where(entry.sidecar.name)
        sidecar = decode_sidecar(read_listed(store, entry.sidecar), what)
    if len(sidecar.rows) != entry.samples:
        raise ShardError(f"{what}: {len(sidecar.rows)} samples, the manifest says {entry.samples}")
    return sidecar


def read_retired(place: Place, manifest: Manifest) -> frozenset[str]:
    """Ids of samples that are in the shards but no longer live."""
    if manifest.retired is None:
        return frozenset()
    data = read_listed(place, manifest.retired)
    value = parse_json(data, manifest.retired.name, LISTED_MAX_BYTES)
    if not _texts(value):
        raise ShardError(f"{manifest.retired.name}: not a list of sample ids")
    return frozenset(value)


# ---- making --------------------------------------------------------------------------------------


def summarize_rows(
    sidecars: Iterable[tuple[ShardEntry, Sidecar]], retired: frozenset[str] = frozenset()
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """`counts` and `histograms` of a manifest, over live samples; bytes are of whole shards."""
    buckets: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    images: set[str] = set()
    counts = {"samples": 0, "images": 0, "captions": 0, "retired": 0, "bytes": 0}
    for entry, sidecar in sidecars:
        counts["bytes"] += entry.tar.bytes + entry.sidecar.bytes
        for row in sidecar.rows:
            if row.sample_id in retired:
                counts["retired"] += 1
                continue
            counts["samples"] += 1
            counts["captions"] += len(row.token_counts)
            images.add(row.source_sha256)
            buckets[f"{row.bucket[0]}x{row.bucket[1]}"] += 1
            groups[row.group] += 1
            tokens.update(str(count) for count in row.token_counts)
    counts["images"] = len(images)
    histograms = {"buckets": dict(buckets), "tokens": dict(tokens), "groups": dict(groups)}
    return counts, histograms


def fingerprint_difference(old: Fingerprint, new: Fingerprint) -> list[str]:
    """One line a differing field: `text.max_tokens: 1024 -> 512`."""
    lines: list[str] = []

    def walk(path: str, left: Any, right: Any) -> None:
        if isinstance(left, dict) and isinstance(right, dict):
            for key in sorted({*left, *right}):
                walk(f"{path}.{key}" if path else key, left.get(key), right.get(key))
        elif left != right:
            lines.append(f"{path}: {_short(left)} -> {_short(right)}")

    walk("", asdict(old), asdict(new))
    return lines


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."
