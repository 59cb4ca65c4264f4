"""What goes wrong on one rank. `arm` runs in that rank's process before the command; from
then on the fault waits for its moment, notes the time and strikes once."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Fault:
    """Patches that let a fault strike at its `number`-th occasion."""

    def __init__(self, number: int, shards: Path, struck: Path) -> None:
        self.number, self.shards, self._struck = number, shards, struck
        self._count, self._lock = 0, threading.Lock()

    def due(self) -> bool:
        with self._lock:
            self._count += 1
            return self._count == self.number

    def note(self) -> None:
        """The moment from which the ends of all ranks are timed; the first one counts."""
        if not self._struck.exists():
            self._struck.write_text(repr(time.monotonic()))

    def before(self, owner: Any, name: str, strike: Callable[[], Any]) -> None:
        """Strike before the `number`-th call of owner.name."""
        plain = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if self.due():
                self.note()
                strike()
            return plain(*arguments, **more)

        setattr(owner, name, call)

    def on_losses(self, change: Callable[[Any], Any]) -> None:
        """Let `change` have the losses of the first micro-batch of step `number`; with a negative
        number of the last one of that step. Once."""
        from qwen_lora.train.step import SampleLosses, Stepper

        plain_run, plain_forward = Stepper.run, SampleLosses.forward
        left = 0

        def run(stepper: Any, step: int, work: Any, samples: int) -> Any:
            nonlocal left
            left = 0
            if step + 1 == abs(self.number):
                left = 1 if self.number > 0 else len(work)
            return plain_run(stepper, step, work, samples)

        def forward(module: Any, batch: Any) -> Any:
            nonlocal left
            losses = plain_forward(module, batch)
            left -= 1
            if left == 0:
                self.note()
                return change(losses)
            return losses

        Stepper.run = run  # type: ignore[method-assign]
        SampleLosses.forward = forward  # type: ignore[method-assign]


def out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def bug() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _in_backward(strike: Callable[[], None]) -> Callable[[Any], Any]:
    def change(losses: Any) -> Any:
        losses.register_hook(lambda _: strike())
        return losses

    return change


def _in_forward(strike: Callable[[], None]) -> Callable[[Any], Any]:
    def change(losses: Any) -> Any:
        strike()
        return losses

    return change


def _damage(fault: Fault) -> None:
    """Flip a bit in every 16th byte of this rank's copy."""
    for tar in fault.shards.glob("shard-*.tar"):
        data = bytearray(tar.read_bytes())
        data[::16] = bytes(byte ^ 1 for byte in data[::16])
        with open(tar, "r+b") as file:
            file.write(data)


def _truncate(fault: Fault) -> None:
    for tar in fault.shards.glob("shard-*.tar"):
        os.truncate(tar, tar.stat().st_size // 3)


def _remove(fault: Fault) -> None:
    for tar in fault.shards.glob("shard-*.tar"):
        tar.unlink()


def _die() -> None:
    raise SystemExit("the thread is gone")


def _memory() -> None:
    raise MemoryError


def _reader(fault: Fault, strike: Callable[[], None]) -> None:
    from qwen_lora.shards.reader import ShardSet

    fault.before(ShardSet, "read", strike)


def _while_saving(fault: Fault, strike: Callable[[], None]) -> None:
    """In rank 0 in the middle of a save; elsewhere while rank 0 is saving ("slow disk" there)."""
    from qwen_lora.train import checkpoint
    from qwen_lora.train.loop import Loop

    if os.environ["RANK"] == "0":
        fault.before(checkpoint.os, "rename", strike)
        return
    plain = Loop._save_when_due

    def save(loop: Any) -> Any:
        if fault.due():
            threading.Timer(0.1, lambda: (fault.note(), strike())).start()
        return plain(loop)

    Loop._save_when_due = save  # type: ignore[method-assign]


def _no_module(fault: Fault, name: str) -> None:
    class Missing:
        def find_spec(self, wanted: str, *_: Any) -> None:
            if wanted == name:
                fault.note()
                raise ImportError(f"libgone.so.1: cannot open shared object file ({wanted})")

    package, _, last = name.rpartition(".")
    delattr(sys.modules[package], last)
    del sys.modules[name]
    sys.meta_path.insert(0, Missing())  # type: ignore[arg-type]


def _other_version(fault: Fault) -> None:
    from qwen_lora.train import resume

    def version(name: str) -> str:
        fault.note()
        return "0.0.1" if name == "peft" else importlib.metadata.version(name)

    resume.version = version


def _never_again(fault: Fault) -> None:
    """No forward pass from this rank's `number`-th on finds memory enough."""
    from qwen_lora.train.step import SampleLosses

    plain = SampleLosses.forward

    def forward(module: Any, batch: Any) -> Any:
        fault.number -= 1
        if fault.number <= 0:
            fault.note()
            out_of_memory()
        return plain(module, batch)

    SampleLosses.forward = forward  # type: ignore[method-assign]


def _in_update(fault: Fault) -> None:
    """Where the kernel of the step `number` would start: the step is counted already."""
    import torch

    from qwen_lora.train.step import Stepper

    plain_update, plain_kernel, due = Stepper._update, torch._fused_adamw_, False

    def update(stepper: Any, step: int) -> None:
        nonlocal due
        due = step + 1 == fault.number
        plain_update(stepper, step)

    def kernel(*arguments: Any, **more: Any) -> Any:
        nonlocal due
        if due:
            due = False
            fault.note()
            out_of_memory()
        return plain_kernel(*arguments, **more)

    Stepper._update = update  # type: ignore[method-assign]
    torch._fused_adamw_ = kernel


def _stuck(fault: Fault) -> None:
    """A wait that no exception and no closed connection ends, as in a collective on a GPU."""
    fault.on_losses(lambda _: threading.Lock().acquire() and threading.Event().wait())


def _patches() -> dict[str, Callable[[Fault], None]]:
    from qwen_lora import lifeline
    from qwen_lora.train import assemble, checkpoint, export, metrics, optimizer, run
    from qwen_lora.train.flat import FlatLora
    from qwen_lora.train.previews import Previews
    from qwen_lora.train.validation import Measure

    first = os.environ["RANK"] == "0"

    def before(owner: Any, name: str, strike: Callable[[], Any]) -> Callable[[Fault], None]:
        return lambda fault: fault.before(owner, name, strike)

    return {
        "damaged record": lambda fault: _reader(fault, lambda: _damage(fault)),
        "truncated shard": lambda fault: _reader(fault, lambda: _truncate(fault)),
        "missing shard": lambda fault: _reader(fault, lambda: _remove(fault)),
        "memory short in a reader": lambda fault: _reader(fault, _memory),
        "reading thread gone": lambda fault: _reader(fault, _die),
        "no GPU memory, forward": lambda fault: fault.on_losses(_in_forward(out_of_memory)),
        "no GPU memory, backward": lambda fault: fault.on_losses(_in_backward(out_of_memory)),
        "no GPU memory any more": _never_again,
        "no GPU memory, optimizer's state": before(FlatLora, "make_state", out_of_memory),
        "no GPU memory, update": _in_update,
        "no GPU memory, validation": before(Measure, "_losses_of", out_of_memory),
        "no GPU memory, preview": before(Previews, "_draw", out_of_memory),
        "bug in forward": lambda fault: fault.on_losses(_in_forward(bug)),
        "bug in backward": lambda fault: fault.on_losses(_in_backward(bug)),
        "loss not finite": lambda fault: fault.on_losses(lambda losses: losses * float("nan")),
        "killed in forward": lambda fault: fault.on_losses(_in_forward(kill)),
        "killed in backward": lambda fault: fault.on_losses(_in_backward(kill)),
        "killed at a save": lambda fault: _while_saving(fault, kill),
        "killed while loading": before(assemble, "load_base", kill),
        "killed while meeting": before(lifeline, "accept" if first else "send", kill),
        "killed before meeting": before(run, "train", kill),
        "full disk at a save": before(checkpoint, "fsync_folder", full_disk),
        "full disk at the metrics": before(metrics.os, "write", full_disk),
        "full disk at the export": before(export, "write_atomic", full_disk),
        "model does not load": before(assemble, "load_base", bug),
        "module missing": lambda fault: _no_module(fault, "qwen_lora.train.assemble"),
        "slow disk": lambda fault: fault.before(checkpoint, "fsync_folder", lambda: time.sleep(1)),
        "other package": _other_version,
        "SIGTERM": lambda fault: fault.on_losses(_in_forward(terminate)),
        "stuck": _stuck,
        # No fault: as it was before AdamW got one tensor for all.
        "parameters apart": lambda _: setattr(optimizer, "fits", lambda *_: False),
    }


def _precompute_patches() -> dict[str, Callable[[Fault], None]]:
    from qwen_lora.precompute import encode, run
    from qwen_lora.precompute.lead import Lead
    from qwen_lora.shards import writer

    def before(owner: Any, name: str, strike: Callable[[], Any]) -> Callable[[Fault], None]:
        return lambda fault: fault.before(owner, name, strike)

    return {
        "bug in the encoders": before(encode, "_latents", bug),
        "killed while encoding": before(encode, "_latents", kill),
        "SIGTERM while encoding": before(encode, "_latents", terminate),
        "full disk at a shard": before(writer, "write_shard", full_disk),
        "no model": before(run, "resolve_model", bug),
        "killed while planning": before(Lead, "plan", kill),
        "killed at the manifest": before(Lead, "publish", kill),
    }


def arm(name: str, number: int, shards: str, struck: str) -> None:
    """From here on the fault of that name waits in this process."""
    if name != "none":
        (_patches() | _precompute_patches())[name](Fault(number, Path(shards), Path(struck)))
