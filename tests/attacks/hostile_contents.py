"""Attacks with what the files hold: JSON, safetensors, numbers that cannot be."""

from __future__ import annotations

from pathlib import Path

from forged_sets import Forgery
from named_attacks import Attack, adder_to

from qwen_lora.hashing import canonical_json, sha256_hex

ATTACKS: list[Attack] = []
attack = adder_to(ATTACKS)


def tensors_file(header: bytes | str, body: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + body


# ---- JSON bombs ----------------------------------------------------------------------------------

JSON_BOMBS = {
    "200,000 nested lists": b"[" * 200_000,
    "200,000 nested objects": b'{"a":' * 200_000,
    "a number of a million digits": b"[" + b"9" * 1_000_000 + b"]",
    "a list of 300,000 empty lists": b"[" + b"[]," * 300_000 + b"[]]",
    "a key twice": b'{"format_major":1,"format_major":1}',
    "NaN": b'{"format_major":NaN}',
    "an infinite number": b'{"format_major":1e999}',
    "bytes that are no UTF-8": b'"\xff\xfe"',
    "half a surrogate": b'{"format_major":"\\ud800"}',
    "nothing": b"",
    "null": b"null",
}

for _what, _bomb in JSON_BOMBS.items():

    @attack(f"{_what} as JSON member")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> None:
        forgery.member(0, 0, bomb)

    @attack(f"{_what} as sidecar")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> dict[str, bytes]:
        return {"sidecar": bomb}

    @attack(f"{_what} as manifest")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> dict[str, bytes]:
        return {"manifest": bomb}

    @attack(f"{_what} as latent-to-RGB map")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> None:
        forgery.listed("rgb", ".json", bomb or b" ")


# ---- safetensors bombs ---------------------------------------------------------------------------

_EMPTY = ",".join(
    f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(100_000)
)
_ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
TENSOR_BOMBS = {
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (60_000).to_bytes(8, "little") + b"{}",
    "a header of 100,000 empty tensors": tensors_file("{" + _EMPTY + "}"),
    "a header of nested lists": tensors_file("[" * 60_000),
    "a tensor's name twice": tensors_file(f'{{"a":{_ONE},"a":{_ONE}}}', b"x"),
    "a tensor of 2^60 numbers": tensors_file(
        '{"latents":{"dtype":"F16","shape":[1073741824,1073741824],"data_offsets":[0,4]}}', b"abcd"
    ),
    "offsets beyond the file": tensors_file(
        '{"latents":{"dtype":"U8","shape":[9000000000],"data_offsets":[0,9000000000]}}', b"x"
    ),
    "offsets before the tensors": tensors_file(
        '{"latents":{"dtype":"U8","shape":[1],"data_offsets":[-9,-8]}}', b"x"
    ),
    "tensors that overlap": tensors_file(f'{{"a":{_ONE},"b":{_ONE}}}', b"x"),
    "bytes behind the tensors": tensors_file(f'{{"a":{_ONE}}}', b"x" * 99),
    "an unknown dtype": tensors_file(
        '{"a":{"dtype":"OBJECT","shape":[1],"data_offsets":[0,1]}}', b"x"
    ),
    "seven bytes": b"\0" * 7,
}

for _what, _bomb in TENSOR_BOMBS.items():

    @attack(f"{_what} as record")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> None:
        forgery.member(0, 1, bomb)

    @attack(f"{_what} as unconditional file")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> None:
        forgery.listed("unconditional", ".safetensors", bomb)

    @attack(f"{_what} as previews file")
    def _(forgery: Forgery, canary: Path, bomb: bytes = _bomb) -> None:
        forgery.listed("previews", ".safetensors", bomb)


# ---- formats and manifests -----------------------------------------------------------------------


@attack("a newer format")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.manifest["format_major"] = 2


@attack("a feature that this version lacks")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.manifest["required_features"] = [f"pipe:touch {canary}"]


@attack("a newer format in the sidecar alone")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.sidecar["format"] = [2, 0]


@attack("a shard of 10^18 samples")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    forgery.publish()
    forgery.manifest["shards"][0]["samples"] = 10**18
    return {"manifest": canonical_json(forgery.manifest)}


@attack("a shard of 2^47 bytes")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    forgery.publish()
    forgery.manifest["shards"][0]["tar"]["bytes"] = 1 << 47
    return {"manifest": canonical_json(forgery.manifest)}


@attack("a sidecar of 1 GiB, by its entry")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    forgery.publish()
    forgery.manifest["shards"][0]["sidecar"]["bytes"] = 1 << 30
    return {"manifest": canonical_json(forgery.manifest)}


@attack("1,000 shards that are not there")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    forgery.publish()
    entry = forgery.manifest["shards"][0]
    shards = []
    for number in range(1_000):
        sha256 = sha256_hex(str(number).encode())
        tar = entry["tar"] | {"name": f"shard-{sha256[:12]}.tar", "sha256": sha256}
        sidecar = entry["sidecar"] | {"name": f"shard-{sha256[:12]}.json"}
        shards.append({"tar": tar, "sidecar": sidecar, "samples": 2})
    return {"manifest": canonical_json(forgery.manifest | {"shards": shards})}


@attack("members of 2^39 bytes, by the sidecar")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.sidecar["columns"]["safetensors_bytes"] = [1 << 39, 1 << 39]


@attack("members that lie beyond the tar")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.sidecar["columns"]["safetensors_offset"][1] += 1 << 40


@attack("a bucket of a million pixels a side")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.sidecar["columns"]["bucket"][0] = [1 << 19, 1 << 19]


@attack("latents of a million channels")
def _(forgery: Forgery, canary: Path) -> None:
    forgery.manifest["latent_channels"] = (1 << 20) - 1


@attack("another family, whose name is a path", text=True)
def _(forgery: Forgery, canary: Path) -> None:
    for place in (forgery.manifest, forgery.sidecar):
        place["fingerprint"]["family"] = f"../../{canary}"
