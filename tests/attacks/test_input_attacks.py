"""Everything else that may come from a stranger: settings, datasets, models, checkpoints, LoRAs."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from audit_hook import Guard, guarded
from payloads import payload, plain_tar
from PIL import Image

from qwen_lora.config.load import load_settings
from qwen_lora.config.schema import DataConfig
from qwen_lora.errors import InputError, QwenLoraError
from qwen_lora.hashing import canonical_json, hash_json, sha256_hex
from qwen_lora.models import resolve_model
from qwen_lora.precompute.images import DecodeError, decode_image
from qwen_lora.precompute.inspect import inspect_image
from qwen_lora.precompute.scan import scan_dataset
from qwen_lora.precompute.types import Candidate, ImageSource, Inspection
from qwen_lora.shards.format import Geometry
from qwen_lora.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    RunFacts,
    TrainState,
)
from qwen_lora.train.export import read_lora

SECONDS, BYTES = 5.0, 256 << 20


def check(guard: Guard, canary: Path) -> None:
    assert guard.violations == [] and not canary.exists()
    assert guard.seconds < SECONDS and guard.grown_bytes < BYTES


# ---- settings ------------------------------------------------------------------------------------

YAML = (
    "!!python/object/apply:os.system ['touch CANARY']",
    "rank: !!python/object/apply:os.system ['touch CANARY']",
    "rank: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
    "rank: !!python/name:os.system",
    "output_dir: !!python/module:this",
    "rank: !!binary Y2FuYXJ5",
    "rank: __import__('os').system('touch CANARY')",
    "lr_scheduler: $(touch CANARY)",
    "a: &a [*a]",
    "a: " + "[" * 5000,
)


@pytest.mark.parametrize("text", YAML)
def test_settings_are_data(text: str, tmp_path: Path) -> None:
    file, canary = tmp_path / "lora.yaml", tmp_path / "canary"
    file.write_text("rank: 4\n")
    load_settings("train", file, [], {}, notes=[])  # imports on first use
    file.write_text(text.replace("CANARY", str(canary)))
    with guarded(tmp_path) as guard, pytest.raises(InputError):
        load_settings("train", file, [], {}, notes=[])
    check(guard, canary)


# ---- datasets ------------------------------------------------------------------------------------


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


def odd_member(kind: bytes, name: str = "1.png", link: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def special(kind: bytes) -> bytes:
    return plain_tar([(odd_member(kind), b""), ("1.txt", b"red")])


TARS: dict[str, Callable[[Path], bytes]] = {
    "pickles": lambda path: plain_tar([(f"1.{s}", payload(path)) for s in ("pyd", "pkl", "pt")]),
    "a pickle as image": lambda path: plain_tar([("1.png", payload(path)), ("1.txt", b"x")]),
    "a pickle as caption": lambda path: plain_tar([("1.png", png()), ("1.json", payload(path))]),
    "paths": lambda path: plain_tar([("../../1.png", png()), ("/etc/2.png", png())]),
    "a symbolic link": lambda path: special(tarfile.SYMTYPE),
    "a hard link": lambda path: special(tarfile.LNKTYPE),
    "a device": lambda path: special(tarfile.CHRTYPE),
    "a named pipe": lambda path: special(tarfile.FIFOTYPE),
    "a command as name": lambda path: plain_tar([(f"$(touch {path}).png", png())]),
}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pillow imports its decoders at the first file that none of the usual ones knows."""
    path = tmp_path_factory.mktemp("first") / "x.png"
    for content in (png(), b"no image"):
        path.write_bytes(content)
        use_image(Candidate(ImageSource(path.name, path), ("a caption",)), DataConfig())


@pytest.mark.parametrize("kind", TARS)
def test_tars_as_input(kind: str, decoders: None, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "dataset"
    folder.mkdir()
    (folder / "a.tar").write_bytes(plain_tar([("1.png", png()), ("1.txt", b"red")]))
    use_dataset(folder)  # imports on first use
    (folder / "a.tar").write_bytes(TARS[kind](canary))
    with guarded(folder) as guard:
        use_dataset(folder)
    check(guard, canary)


def use_dataset(folder: Path) -> list[str]:
    """Scan and decode everything; reasons of what was refused."""
    data = DataConfig(img_dir=folder)
    try:
        scan = scan_dataset(folder, data)
    except InputError as error:
        return [str(error)]
    return [skip.reason for skip in scan.skips] + [use_image(one, data) for one in scan.candidates]


def use_image(candidate: Candidate, data: DataConfig) -> str:
    found = inspect_image(candidate, data)
    if not isinstance(found, Inspection):
        return str(found.reason)
    size = found.original_size
    try:
        decode_image(found, Geometry((0, 0, *size), (64, 64)), data)
    except DecodeError as error:
        return str(error.reason)
    return "decoded"


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        data = kind + content
        return struct.pack(">I", len(content)) + data + struct.pack(">I", zlib.crc32(data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(min(height, 100) * (width // 8 + 1)))
    ends = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


def png_with_text_bomb() -> bytes:
    text = b"zTXt" + b"key\0\0" + zlib.compress(bytes(64 << 20))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    plain = png()
    return plain[:33] + chunk + plain[33:]


IMAGES: dict[str, Callable[[Path], bytes]] = {
    "EPS with a command": lambda canary: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
        b"(%pipe%touch " + str(canary).encode() + b") (r) file\n%%EOF\n"
    ),
    "SVG with a link": lambda canary: (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    ),
    "a pickle": payload,
    "a PNG of 60,000 x 60,000": lambda canary: bomb(60_000, 60_000),
    "a PNG with 64 MiB of text": lambda canary: png_with_text_bomb(),
    "FITS": lambda canary: b"SIMPLE  =                    T".ljust(2880),
    "PSD": lambda canary: b"8BPS\0\1" + bytes(40),
    "HDF5": lambda canary: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a web page": lambda canary: b"<!DOCTYPE html><html><script>alert(1)</script></html>",
    "PDF": lambda canary: b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch>>>>\n",
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind: str, suffix: str, decoders: None, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "dataset"
    folder.mkdir()
    path, data = folder / f"1.{suffix}", DataConfig()
    candidate = Candidate(ImageSource(path.name, path), ("a caption",))
    path.write_bytes(png())
    assert use_image(candidate, data) == "decoded"
    path.write_bytes(IMAGES[kind](canary))
    with guarded(folder) as guard:
        assert use_image(candidate, data) != "decoded"
    check(guard, canary)


METADATA = (
    {"file_name": "../../../etc/passwd", "text": "x"},
    {"file_name": "/etc/passwd", "text": "x"},
    {"file_name": "file:///etc/passwd", "text": "x"},
    {"file_name": "http://169.254.169.254/latest", "text": "x"},
    {"file_name": "pipe:touch CANARY", "text": "x"},
    {"file_name": "1.png", "text": {"__reduce__": ["os.system", "touch CANARY"]}},
)


@pytest.mark.parametrize("row", METADATA)
def test_metadata_names_only_files_of_the_dataset(row: dict[str, Any], tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "dataset"
    folder.mkdir()
    (folder / "1.png").write_bytes(png())
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "red"}')
    assert use_dataset(folder) == ["decoded"]
    (folder / "metadata.jsonl").write_text(json.dumps(row).replace("CANARY", str(canary)))
    with guarded(folder) as guard:
        assert use_dataset(folder) != ["decoded"]
    check(guard, canary)


# ---- checkpoints and LoRA files ------------------------------------------------------------------

FACTS = RunFacts({}, "float32", 1, "p", ("g",), ("f",), "b")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "run")
    tensors = {"a": torch.zeros(2)}
    store.save(Checkpoint(FACTS, TrainState(step=1), tensors, tensors), keep=1)
    store.load(1)
    return store


def forge(store: CheckpointStore, name: str, content: bytes) -> None:
    """Replace a file and let state.json vouch for it."""
    (store.path(1) / name).write_bytes(content)
    path = store.path(1) / "state.json"
    state = json.loads(path.read_bytes())
    state.pop("sha256")
    if name != "state.json":
        state["files"][name] = {"bytes": len(content), "sha256": sha256_hex(content)}
    path.write_bytes(canonical_json({**state, "sha256": hash_json(state)}))


@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.safetensors"])
def test_checkpoints_hold_no_code(store: CheckpointStore, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"a": torch.zeros(1)}, buffer := io.BytesIO())
    for content in (payload(canary), buffer.getvalue(), b"", (1 << 62).to_bytes(8, "little")):
        forge(store, name, content)
        with guarded(tmp_path) as guard, pytest.raises(CheckpointError):
            store.load(1)
        check(guard, canary)


@pytest.mark.parametrize("change", [{"facts": 1}, {"state": {"x": 1}}, {"files": []}, {"lora": 0}])
def test_forged_states_end_in_one_line(store: CheckpointStore, change: dict[str, Any]) -> None:
    path = store.path(1) / "state.json"
    state = json.loads(path.read_bytes()) | change
    state.pop("sha256")
    if "lora" in change:
        del state["optimizer"]
    path.write_bytes(canonical_json({**state, "sha256": hash_json(state)}))
    with pytest.raises(CheckpointError, match="is no checkpoint of format"):
        store.load(1)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", '{"sha256":1}', ""])
def test_states_that_are_no_object(store: CheckpointStore, text: str) -> None:
    (store.path(1) / "state.json").write_text(text)
    with pytest.raises(CheckpointError):
        store.load(1)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin", "lora.pt"])
def test_lora_files_hold_no_code(name: str, tmp_path: Path) -> None:
    from qwen_lora.sample import _lora_file

    canary, file = tmp_path / "canary", tmp_path / name
    file.write_bytes(safetensors.torch.save({"lora": torch.zeros(1)}))
    read_lora(file), _lora_file(file)
    file.write_bytes(payload(canary))
    for read in (read_lora, _lora_file):
        with guarded(tmp_path) as guard, pytest.raises(InputError):
            read(file)
        check(guard, canary)


# ---- models --------------------------------------------------------------------------------------


@pytest.fixture
def hostile_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose every part asks for its own code, and whose code leaves a canary."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    evil = f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
    for part in ("", "transformer", "vae", "text_encoder", "tokenizer"):
        for name in ("evil.py", "pipeline.py", "modeling_evil.py", "__init__.py", "setup.py"):
            (folder / part / name).write_text(evil)
    for config in folder.rglob("*config.json"):
        value = json.loads(config.read_bytes())
        value["auto_map"] = {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        config.write_text(json.dumps(value))
    return folder


def test_a_models_own_code_is_never_run(hostile_model: Path, tmp_path: Path) -> None:
    from qwen_lora.sample import load_pipeline

    parts = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    model = resolve_model(str(hostile_model), parts)
    model.family.load_tokenizer(model)
    try:
        load_pipeline(model, dtype="float32")
    except (QwenLoraError, OSError, ValueError):
        pass
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickled_weights_are_refused(
    part: str, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from qwen_lora.models import weight_files

    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny_model, folder)
    for file in (folder / part).glob("*.safetensors*"):
        file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (folder / part / name).write_bytes(payload(canary))
    with guarded(tmp_path) as guard, pytest.raises(InputError, match="which cannot run code"):
        weight_files(folder / part)
    check(guard, canary)
