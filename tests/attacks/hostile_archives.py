"""Attacks with files and archives: pickles, names, tar headers, compression."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

from forged_sets import Forgery
from named_attacks import Attack, adder_to
from payloads import payload, plain_tar

from qwen_lora.hashing import canonical_json
from qwen_lora.shards.tar import canonical_header, padded, tar_bytes

ATTACKS: list[Attack] = []
attack = adder_to(ATTACKS)

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
