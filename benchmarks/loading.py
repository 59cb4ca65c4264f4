"""Start-up: loading a transformer, beside reading the bytes of its files.

python benchmarks/loading.py                a made checkpoint of 2 GiB, blocks of the real size
python benchmarks/loading.py --mib 16384

Random bf16 weights in Qwen-Image's layout are written first, so the files are in the page cache.
"reading" reads them with one thread, into a small buffer again and again; "reading, kept" into new
memory, as whoever keeps the bytes must; "diffusers" is `from_pretrained` in bf16, which on a CPU
maps the files and reads nothing before its first use. Each way runs in a process of its own, and
more than once there: "first" is the first time, when a virtual machine may have to ask its host for
memory, "again" the median of the others. A model is loaded when every page of it was looked at.
Memory is the process's own on the host (RssAnon: mapped files do not count, the system takes them
back); "above" is the most during loading beyond what stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, print_table
from safetensors.torch import save_file

from qwen_lora.models import resolve_model, weight_files

HEAD, NAME = 128, "diffusion_pytorch_model"
WAYS = ("bf16", "fp8", "int8", "nf4")
READING, DIFFUSERS = "reading, kept", "diffusers"
AGAIN = 3
MIB = 1 << 20


def main() -> None:
    options = _options()
    if options.one:
        single = Path(options.single) if options.single else None
        print(json.dumps(_measure(Path(options.folder), options.one, single)))
        return
    print(machine())
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}")
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        block = make_checkpoint(folder, options.heads, options.mib * MIB, options.file_mib * MIB)
        files = weight_files(folder / "transformer")
        total = sum(path.stat().st_size for path in files)
        _read(files)
        reading = statistics.median(_read(files) for _ in range(options.repeats + 1))
        single = folder / "single.safetensors"
        _join(files, single)
        rows: list[list[object]] = [["reading", "", f"{reading:.3f}", "1.00", *[""] * 4]]
        kept = 0.0
        others: list[tuple[str, Path | None]] = [(READING, None), (DIFFUSERS, None)]
        for way, source in [*others, *_ways(options.ways, single)]:
            found = [_in_process(folder, way, source) for _ in range(options.repeats)]
            if "error" in found[0]:
                rows.append([way, found[0]["error"], *[""] * 6])
                continue
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            kept = kept or middle["again"]
            rows.append(
                [
                    f"{way}, one file" if source else way,
                    f"{middle['first']:.3f}",
                    f"{middle['again']:.3f}",
                    f"{middle['again'] / reading:.2f}",
                    f"{middle['again'] / kept:.2f}",
                    *(f"{middle[key] / MIB:.0f}" for key in ("held", "stays", "above")),
                ]
            )
    header = [
        "this project unless named",
        "first s",
        "again s",
        "of reading",
        "of kept",
        "weights MiB",
        "host MiB",
        "above",
    ]
    title = f"{total / MIB:.0f} MiB in {len(files)} files, a block is {block / MIB:.0f} MiB"
    print_table(title, header, rows)


def _ways(names: list[str], single: Path) -> list[tuple[str, Path | None]]:
    both = ("bf16", "fp8")
    return [(way, file) for way in names for file in (None, single) if way in both or file is None]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--file-mib", type=int, default=512)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--dir", help="where the checkpoint is made; default: the system's")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--single", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoint(folder: Path, heads: int, size: int, file_size: int) -> int:
    """A transformer folder of about `size` bytes; returns a block's bytes in bf16."""
    from diffusers import QwenImageTransformer2DModel

    axes = {"attention_head_dim": HEAD, "num_attention_heads": heads}

    def empty(layers: int) -> Any:
        with torch.device("meta"):
            return QwenImageTransformer2DModel(num_layers=layers, **axes)

    one, two = (2 * sum(p.numel() for p in empty(count).parameters()) for count in (1, 2))
    model = empty(max(2, round((size - one) / (two - one)) + 1))
    target = folder / "transformer"
    target.mkdir()
    model.save_config(target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    number = taken = 0

    def flush() -> None:
        nonlocal tensors, number, taken
        number += 1
        name = f"{NAME}-{number:05d}.safetensors"
        save_file(tensors, target / name)
        weight_map.update(dict.fromkeys(tensors, name))
        tensors, taken = {}, 0

    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random, device=device)
        tensors[name] = noise.mul_(0.02).bfloat16().cpu()
        taken += 2 * parameter.numel()
        if taken >= file_size:
            flush()
    if tensors:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (target / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))
    return two - one


def _join(files: list[Path], target: Path) -> None:
    """The same weights in one file, with ComfyUI's prefix."""
    from safetensors.torch import load_file

    everything = {
        f"model.diffusion_model.{k}": v for path in files for k, v in load_file(path).items()
    }
    save_file(everything, target)


def _read(files: list[Path]) -> float:
    buffer = bytearray(MIB)
    begun = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def _in_process(folder: Path, way: str, single: Path | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", way, "--folder", str(folder)]
    if single:
        command += ["--single", str(single)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:70]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure(folder: Path, way: str, single: Path | None) -> dict[str, float]:
    """Seconds and bytes; the libraries are imported and the device is awake before."""
    if way == READING:
        make = _reader(folder)
    elif way == DIFFUSERS:
        make = _diffusers(folder)
    else:
        make = _loader(folder, way, single)
    before = own_memory()
    seconds = []
    for number in range(1 + AGAIN):
        with Peak() as peak:
            begun = time.perf_counter()
            tensors = make()
            if number == 0:
                after = own_memory()
        for tensor in tensors:
            if tensor.numel():
                # One byte of each page of memory.
                tensor.contiguous().view(torch.uint8).flatten()[::4096].sum().item()
        seconds.append(time.perf_counter() - begun)
        if number == 0:
            held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            above = max(0, peak.bytes - after)
        del tensors
    return {
        "first": seconds[0],
        "again": statistics.median(seconds[1:]),
        "held": held,
        "stays": after - before,
        "above": above,
    }


def _reader(folder: Path) -> Callable[[], list[torch.Tensor]]:
    files = weight_files(folder / "transformer")
    return lambda: [torch.from_numpy(np.fromfile(path, np.uint8)) for path in files]


def _diffusers(folder: Path) -> Callable[[], list[torch.Tensor]]:
    from diffusers import QwenImageTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)

    def load() -> list[torch.Tensor]:
        model = QwenImageTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=torch.bfloat16
        )
        return [*model.to(device).parameters(), *model.buffers()]

    return load


def _loader(folder: Path, way: str, single: Path | None) -> Callable[[], list[torch.Tensor]]:
    from diffusers import QwenImageTransformer2DModel  # noqa: F401

    from qwen_lora.families.qwen_image import transformer as _  # noqa: F401

    if way == "nf4":
        import bitsandbytes  # noqa: F401
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    model = resolve_model(str(folder), ("transformer",), transformer_file=single)

    def load() -> list[torch.Tensor]:
        loaded = model.family.load_transformer(
            model, device=device, dtype=torch.bfloat16, base_precision=way
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [*loaded.parameters(), *loaded.buffers()]

    return load


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which only Linux has")


class Peak:
    """The most `own_memory` while it is open, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.bytes = max(self.bytes, own_memory())


if __name__ == "__main__":
    main()
