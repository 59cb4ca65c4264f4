"""A rerun that is killed, or shared by two processes, ends with the bytes of one that is not."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from changing_sets import add_image

from qwen_lora.config.schema import Settings
from qwen_lora.precompute.run import precompute
from qwen_lora.shards import writer
from qwen_lora.shards.verify import verify

ROOT = Path(__file__).parents[2]
# Renames are how everything becomes visible; the process dies right before the one asked for.
DIE_AT_A_RENAME = """
import os, signal, sys
from qwen_lora.cli import main

number = int(sys.argv.pop(1))
replace, calls = os.replace, []

def count(*arguments, **options):
    calls.append(os.path.basename(arguments[1]))
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*arguments, **options)

os.replace = count
try:
    main()
finally:
    print("renamed:", *calls)
"""


class Scene:
    """A set, the dataset as it was changed since, and what an unbroken rerun makes of them."""

    def __init__(self, make_settings: Callable[..., Settings], folder: Path) -> None:
        self.folder, self._make = folder, make_settings
        self.data = folder / "images"
        for index in range(10):
            add_image(self.data, f"{index}", index, f"picture {index}", side=64)
        self.before = folder / "before"
        precompute(self.settings(self.before, [32]))
        (self.data / "0.txt").write_text("an edited caption")
        (self.data / "1.txt").write_text("picture 2")
        for name in ("9.png", "9.txt"):
            (self.data / name).unlink()
        for index in range(10, 14):
            add_image(self.data, f"{index}", index, f"picture {index}", side=64)
        self.unbroken = folder / "unbroken"
        shutil.copytree(self.before, self.unbroken)
        summary = precompute(self.settings(self.unbroken), sync=True)
        # 13 images at 64 pixels, and at 32 pixels 4 new ones and 2 with other captions
        assert (summary.samples_written, summary.retired, summary.samples) == (19, 3, 26)

    def settings(self, shards: Path, sizes: list[int] | None = None) -> Settings:
        data = {"img_dir": self.data, "img_size": sizes or [32, 64]}
        return self._make(data, shards_dir=shards)

    def copy(self) -> Path:
        broken = self.folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(self.before, broken)
        return broken

    def command(self, shards: Path) -> list[str]:
        settings = self.settings(shards)
        line = ["precompute", str(self.data), "--output", str(shards), "--sync"]
        line += ["--resolution", "32", "--resolution", "64"]
        line += ["--model", str(settings.pretrained_model_name_or_path)]
        for name in ("encode_threads", "vae_batch_size", "text_batch_size", "shard_max_samples"):
            line += ["--set", f"{name}={getattr(settings, name)}"]
        return line

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def scene(make_settings: Callable[..., Settings], tmp_path: Path) -> Scene:
    return Scene(make_settings, tmp_path)


def check(scene: Scene, broken: Path, published: Callable[[Path], dict[str, bytes]]) -> None:
    """The same command again ends with the unbroken run's files, and nothing else."""
    summary = precompute(scene.settings(broken), sync=True)
    assert (summary.samples, summary.exit_code) == (26, 0)
    assert published(broken) == published(scene.unbroken)
    assert verify(broken).problems == []


def test_a_rerun_that_fails_at_any_shard_or_file_ends_alike(scene, published):
    kinds = {
        "write_shard": "qwen_lora.shards.writer",
        "publish_manifest": "qwen_lora.precompute.lead",
    }
    kinds["write_retired"] = "qwen_lora.precompute.lead"
    broke = 0
    for name, module in kinds.items():
        for number in range(1, 6 if name == "write_shard" else 2):
            broken, calls = scene.copy(), []
            original = getattr(writer, name)

            def fail(*arguments, number=number, calls=calls, original=original):
                calls.append(1)
                if len(calls) == number:
                    raise KeyboardInterrupt
                return original(*arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(f"{module}.{name}", fail)
                with pytest.raises(KeyboardInterrupt):
                    precompute(scene.settings(broken), sync=True)
            left = published(broken)
            assert left["manifest.json"] == published(scene.before)["manifest.json"]
            check(scene, broken, published)
            broke += 1
    assert broke == 7


def killed_at(scene: Scene, broken: Path, number: int) -> list[str]:
    """Kill a rerun right before its `number`-th rename; 0: let it end and list the names."""
    line = ["-c", DIE_AT_A_RENAME, str(number), *scene.command(broken)]
    done = scene.start(*line)
    if number:
        assert done.returncode == -signal.SIGKILL, done.stderr
        return []
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_kill_9_between_a_shard_and_its_sidecar(scene, published):
    broken = scene.copy()
    shards = {name for name in published(scene.before) if name.startswith("shard-")}
    killed_at(scene, broken, 4)  # settings, sources, first shard, its sidecar
    left = {name for name in published(broken) if name.startswith("shard-")} - shards
    assert [Path(name).suffix for name in left] == [".tar"]
    assert published(broken)["manifest.json"] == published(scene.before)["manifest.json"]
    check(scene, broken, published)


@pytest.mark.slow
def test_kill_9_before_every_rename(scene, published):
    names = killed_at(scene, scene.copy(), 0)
    assert {"manifest.json", "sources.json", "report.jsonl"} <= set(names)
    assert published(scene.folder / "broken") == published(scene.unbroken)
    for number in range(1, len(names) + 1):
        broken = scene.copy()
        killed_at(scene, broken, number)
        print(f"killed before rename {number} of {len(names)}: {names[number - 1]}")
        check(scene, broken, published)


@pytest.mark.multiprocess
def test_two_processes_make_the_rerun_of_one(scene, published):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    broken = scene.copy()
    done = scene.start(*launch, "-m", "qwen_lora", *scene.command(broken))
    assert done.returncode == 0, done.stderr
    assert published(broken) == published(scene.unbroken)
