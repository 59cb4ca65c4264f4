"""The named attacks on whoever opens a shard set; each makes one forged set."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forged_sets import Forgery
from payloads import payload, plain_tar

from qwen_lora.hashing import canonical_json, sha256_hex
from qwen_lora.shards.tar import canonical_header, padded, tar_bytes


@dataclass(frozen=True)
class Attack:
    """`outside`: the change lies outside every member, so that reading may go on unharmed.
    `text`: it is a text that nobody may act on; reading gives it back, verify refuses the ids."""

    name: str
    make: Callable[[Path, Path], None]  # (folder of the set, canary)
    outside: bool = False
    text: bool = False


ATTACKS: list[Attack] = []


def attack(name: str, outside: bool = False, text: bool = False) -> Callable[[Any], Any]:
    def register(make: Callable[[Forgery, Path], dict[str, bytes] | None]) -> Any:
        def publish(folder: Path, canary: Path) -> None:
            forgery = Forgery(folder)
            forgery.publish(**(make(forgery, canary) or {}))

        ATTACKS.append(Attack(name, publish, outside, text))
        return make

    return register


def tensors_file(header: bytes | str, body: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + body


# ---- pickles -------------------------------------------------------------------------------------

for _row, _member, _name in ((0, 0, "json"), (1, 1, "safetensors")):

    @attack(f"a pickle as {_name} member")
    def _(forgery: Forgery, canary: Path, row: int = _row, member: int = _member) -> None:
        forgery.member(row, member, payload(canary))


for _suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "py", "so"):

    @attack(f"a .{_suffix} member behind the records", outside=True)
    def _(forgery: Forgery, canary: Path, suffix: str = _suffix) -> None:
        end = len(forgery.tar.rstrip(b"\0"))
        end = padded(end)
        name = forgery.sidecar["columns"]["sample_id"][1]
        data = payload(canary)
        tar = forgery.tar[:end] + canonical_header(f"{name}.{suffix}", len(data))
        tar += data + bytes(padded(len(data)) - len(data))
        forgery.tar = tar + bytes(tar_bytes(len(tar)) - len(tar))


for _kind, _ending in (
    ("unconditional", ".safetensors"),
    ("previews", ".safetensors"),
    ("rgb", ".json"),
    ("retired", ".json"),
):

    @attack(f"a pickle as {_kind} file")
    def _(forgery: Forgery, canary: Path, kind: str = _kind, ending: str = _ending) -> None:
        forgery.listed(kind, ending, payload(canary))


@attack("a pickle as sidecar")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    return {"sidecar": payload(canary)}


@attack("a pickle as manifest")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    return {"manifest": payload(canary)}


# ---- names: pipes, paths, URLs -------------------------------------------------------------------

NAMES = (
    *("pipe:touch CANARY", "pipe:touch CANARY #shard-000000000000.tar", "|touch CANARY"),
    *("../../CANARY.tar", "/etc/passwd", "shard-000000000000.tar/../../../etc/passwd"),
    *("file:///etc/passwd", "http://169.254.169.254/latest/shard-000000000000.tar"),
    *("\\\\host\\share\\shard-000000000000.tar", "C:\\shard-000000000000.tar", "-o.tar", "", "."),
    *("shard-000000000000.tar\0.json", "$(touch CANARY)", "~/shard-000000000000.tar"),
)

for _name in NAMES:
    for _which in ("tar", "sidecar", "unconditional", "previous"):

        @attack(f"{_name!r} as name of the {_which} file")
        def _(forgery: Forgery, canary: Path, name: str = _name, which: str = _which) -> Any:
            name, manifest = name.replace("CANARY", str(canary)), forgery.manifest
            forgery.publish()
            value = json.loads(json.dumps(manifest))
            if which == "previous":
                value["previous"] = name
            elif which == "unconditional":
                value["unconditional"]["name"] = name
            else:
                value["shards"][0][which]["name"] = name
            return {"manifest": canonical_json(value)}


@attack("captions, sources and groups that are commands and paths", text=True)
def _(forgery: Forgery, canary: Path) -> None:
    def change(facts: dict[str, Any]) -> None:
        facts["captions"] = [f"$(touch {canary})" for _ in facts["captions"]]
        facts["source"], facts["group"] = f"../../{canary}", f"`touch {canary}`"

    forgery.facts(0, change)


@attack("captions, sources and groups that are markup and terminal escapes", text=True)
def _(forgery: Forgery, canary: Path) -> None:
    def change(facts: dict[str, Any]) -> None:
        facts["captions"] = [
            '</p></li></ul><script>fetch("//x")</script><img src=x onerror=alert(1)>\x1b]0;a\x07'
            for _ in facts["captions"]
        ]
        facts["source"], facts["group"] = "<svg onload=alert(1)>", "\x1b[2J\u202e<iframe>"

    forgery.facts(0, change)


# ---- tar headers: links, devices, sparse, PAX, GNU, odd ends -------------------------------------


def _swap_header(forgery: Forgery, header: bytes) -> None:
    """Another header of the first member; its data stays where the sidecar says."""
    forgery.tar = header + forgery.tar[512:]


for _type, _what in (
    (tarfile.SYMTYPE, "a symbolic link"),
    (tarfile.LNKTYPE, "a hard link"),
    (tarfile.CHRTYPE, "a device"),
    (tarfile.FIFOTYPE, "a named pipe"),
    (tarfile.DIRTYPE, "a folder"),
    (tarfile.GNUTYPE_SPARSE, "a GNU sparse file"),
    (tarfile.GNUTYPE_LONGNAME, "a GNU long name"),
    (tarfile.XHDTYPE, "a PAX header"),
    (tarfile.XGLTYPE, "a global PAX header"),
):

    @attack(f"{_what} where a member's header should be", outside=True)
    def _(forgery: Forgery, canary: Path, kind: bytes = _type) -> None:
        info = tarfile.TarInfo(f"{forgery.sidecar['columns']['sample_id'][0]}.json")
        info.type, info.linkname, info.mode = kind, "/etc/passwd", 0o644
        info.size = forgery.sidecar["columns"]["json_bytes"][0]
        _swap_header(forgery, info.tobuf(tarfile.USTAR_FORMAT))


for _path in ("../../CANARY", "/etc/CANARY", "a/../../CANARY", ".hidden"):

    @attack(f"a member named {_path}", outside=True)
    def _(forgery: Forgery, canary: Path, path: str = _path) -> None:
        size = forgery.sidecar["columns"]["json_bytes"][0]
        _swap_header(forgery, canonical_header(path, size))


@attack("a sparse member that expands to 8 GiB", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    header = bytearray(forgery.tar[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[257:265] = b"ustar  \0"
    header[386:398] = b"00000000000\0"  # the only piece begins at 0 and is empty
    header[398:410] = b"00000000000\0"
    header[483:495] = b"%011o\0" % (8 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    _swap_header(forgery, bytes(header))


@attack("a size in base 256", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    header = bytearray(forgery.tar[:512])
    header[124:136] = b"\x80" + (1 << 62).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    _swap_header(forgery, bytes(header))


@attack("a negative size", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    header = bytearray(forgery.tar[:512])
    header[124:136] = b"\xff" + (-512 + (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    _swap_header(forgery, bytes(header))


@attack("a second archive behind the first", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    forgery.tar += plain_tar([("x.pkl", payload(canary))])


@attack("bytes behind the end", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    forgery.tar = forgery.tar[:-20] + payload(canary)[:20]


@attack("bytes in the padding behind a member", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    columns = forgery.sidecar["columns"]
    end = columns["json_offset"][1] + columns["json_bytes"][1]
    room = -end % 512
    assert room and not forgery.tar[end : end + room].strip(b"\0")
    hidden = payload(canary)[:room].ljust(room, b"\0")
    forgery.tar = forgery.tar[:end] + hidden + forgery.tar[end + room :]


@attack("the same record twice", outside=True)
def _(forgery: Forgery, canary: Path) -> None:
    end = padded(len(forgery.tar.rstrip(b"\0")))
    forgery.tar = forgery.tar[:end] + forgery.tar


@attack("the same sample id twice in a sidecar")
def _(forgery: Forgery, canary: Path) -> None:
    ids = forgery.sidecar["columns"]["sample_id"]
    ids[1] = ids[0]


@attack("the same shard twice in a manifest")
def _(forgery: Forgery, canary: Path) -> dict[str, bytes]:
    forgery.publish()
    value = json.loads(json.dumps(forgery.manifest))
    value["shards"] *= 2
    return {"manifest": canonical_json(value)}


# ---- compression ---------------------------------------------------------------------------------

for _name, _compress in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):

    @attack(f"a {_name} bomb as shard")
    def _(forgery: Forgery, canary: Path, compress: Any = _compress) -> None:
        forgery.tar = compress(bytes(16 << 20))

    @attack(f"a {_name} bomb as safetensors member")
    def _(forgery: Forgery, canary: Path, compress: Any = _compress) -> None:
        forgery.member(0, 1, compress(bytes(16 << 20)))

    @attack(f"a {_name} bomb as manifest")
    def _(forgery: Forgery, canary: Path, compress: Any = _compress) -> dict[str, bytes]:
        return {"manifest": compress(b'{"a":"' + b" " * (16 << 20) + b'"}')}


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
