"""Commands, exit codes and what they print; the stages themselves are tested elsewhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qwen_lora.cli import app
from qwen_lora.config.load import load_settings
from qwen_lora.config.schema import Settings
from qwen_lora.errors import InputError, QwenLoraError, ShardError, Stopped


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both stages replaced by recorders of what the command line hands them."""
    import qwen_lora.precompute.run
    import qwen_lora.train.run

    seen: dict[str, Any] = {}

    class Outcome:
        exit_code = 0
        lora = Path("output/lora.safetensors")

    def record(name: str) -> Any:
        def stage(settings: Settings, **options: Any) -> Outcome:
            seen[name] = settings
            seen["options"] = options
            if "raises" in seen:
                raise seen["raises"]
            return Outcome()

        return stage

    monkeypatch.setattr(qwen_lora.precompute.run, "precompute", record("precompute"))
    monkeypatch.setattr(qwen_lora.train.run, "train", record("train"))
    seen["outcome"] = Outcome
    return seen


# ---- the stages ------------------------------------------------------------------------------


def test_precompute_maps_its_options(stages: dict[str, Any]) -> None:
    result = invoke(
        "precompute", "images", "--model", "org/name@abc", "--output", "set", "--resolution", "512",
        "--resolution", "1024", "--dry-run", "--no-captions", "--no-source-names",
        "--set", "encode_threads=2", "--set", "data_config.flip=both",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = stages["precompute"]
    assert stages["options"] == {"dry_run": True, "sync": False, "yes": False}
    assert settings.data_config.img_dir == Path("images")
    assert settings.pretrained_model_name_or_path == "org/name@abc"
    assert settings.shards_dir == Path("set")
    assert settings.data_config.img_size == [512, 1024]
    assert settings.data_config.flip == "both"
    assert (settings.captions_in_shards, settings.source_names) == (False, False)
    assert settings.encode_threads == 2
    assert "  data_config.flip: both\n" in result.stderr  # the resolved settings are printed


def test_train_maps_its_options(stages: dict[str, Any]) -> None:
    result = invoke(
        "train", "one", "two", "--model", "folder", "--output", "run", "--max-train-steps", "7",
        "--transformer", "one.safetensors",
        "--rank", "4", "--seed", "5", "--num-processes", "1", "--restart",
        "--set", "logging_steps=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = stages["train"]
    assert stages["options"] == {"restart": True}
    assert [source.path for source in settings.shards] == [Path("one"), Path("two")]
    assert settings.pretrained_model_name_or_path == "folder"
    assert settings.transformer_file == Path("one.safetensors")
    assert settings.output_dir == Path("run")
    assert (settings.max_train_steps, settings.rank, settings.seed) == (7, 4, 5)
    assert settings.logging_steps == 1
    assert result.stdout == f"{Path('output/lora.safetensors')}\n"


@pytest.mark.parametrize("command", ["precompute", "train"])
def test_without_options_the_settings_are_the_defaults(
    command: str, stages: dict[str, Any]
) -> None:
    assert invoke(command).exit_code == 0
    assert stages[command] == Settings()
    assert stages[command].model_fields_set == set()


def test_a_file_feeds_both_commands(stages: dict[str, Any]) -> None:
    Path("lora.yaml").write_text("rank: 4\nseed: 3\nquantize: true\ndata_config: {flip: both}\n")
    assert invoke("precompute", "--config", "lora.yaml").exit_code == 0
    result = invoke("train", "--config", "lora.yaml", "--rank", "8")
    assert result.exit_code == 0
    assert stages["precompute"].data_config.flip == "both"
    assert (stages["train"].rank, stages["train"].seed) == (8, 3)
    assert "note: quantize: true is read as base_precision: int8\n" in result.stderr


def test_precompute_exits_with_the_summarys_code(stages: dict[str, Any]) -> None:
    stages["outcome"].exit_code = 1
    assert invoke("precompute", "images").exit_code == 1


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (QwenLoraError("it failed"), 1, "error: it failed\n"),
        (ShardError("shard x is damaged"), 1, "error: shard x is damaged\n"),
        (InputError("no such folder"), 2, "error: no such folder\n"),
        (Stopped(signal.SIGTERM, "saved at step 3"), 143, "saved at step 3\n"),
        (Stopped(signal.SIGINT), 130, "stopped by SIGINT\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, stages: dict[str, Any]) -> None:
    stages["raises"] = error
    result = invoke("train")
    assert result.exit_code == code
    assert result.stderr.endswith(text) and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_unexpected_error_keeps_its_traceback(stages: dict[str, Any]) -> None:
    stages["raises"] = ZeroDivisionError("a bug")
    result = invoke("train")
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--rank", "0"],
        ["train", "--rank", "x"],
        ["train", "--nonsense"],
        ["nonsense"],
        ["precompute", "a", "b"],
        ["precompute", "--resolution", "8"],
        ["sample", "--output", "x.png"],
        ["shards"],
        ["shards", "nonsense"],
        ["tiny-model"],
        ["train", "--set", "rank"],
        ["train", "--set", "rankk=1"],
        ["train", "--rank", "4", "--set", "rank=5"],
        ["train", "--config", "absent.yaml"],
    ],
)
def test_wrong_usage_is_exit_2(arguments: list[str], stages: dict[str, Any]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "train" not in stages and "precompute" not in stages


@pytest.mark.parametrize(
    "arguments",
    [
        ("precompute", "hf://datasets/photos"),
        ("train", "--output", "gs://bucket/run"),
    ],
)
def test_a_url_is_not_taken_for_a_folder(arguments: Any, stages: dict[str, Any]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "is a URL; a local folder is needed here" in result.stderr
    assert "train" not in stages and "precompute" not in stages


@pytest.mark.parametrize("arguments", [("train", "s3:/b/set"), ("precompute", "--output", "s3:/b")])
def test_a_url_with_a_slash_too_few_is_told(arguments: Any, stages: dict[str, Any]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "has one slash after its colon; a URL has two" in result.stderr


def test_shard_sets_may_be_urls(stages: dict[str, Any]) -> None:
    assert invoke("train", "https://example.org/set/", "~/mine").exit_code == 0
    first, second = stages["train"].shards
    assert first.path == "https://example.org/set"
    assert second.path == Path("~/mine").expanduser()
    assert invoke("precompute", "photos", "--output", "s3://bucket/set").exit_code == 0
    assert stages["precompute"].shards_dir == "s3://bucket/set"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://me:hunter2@example.org/set", "holds credentials"),
        ("https://hunter2@example.org/set", "holds credentials"),
        ("https://example.org/set?token=hunter2", "has no ? or # part"),
        ("https://example.org/set#hunter2", "has no ? or # part"),
    ],
)
def test_a_set_url_holds_no_secret(url: str, reason: str, stages: dict[str, Any]) -> None:
    result = invoke("train", url)
    assert result.exit_code == 2 and reason in result.stderr
    assert "hunter2" not in result.stdout + result.stderr
    assert "train" not in stages


def test_wrong_settings_are_said_by_one_process(
    stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = invoke("train", "--set", "rank=x")
    assert (result.exit_code, result.stderr) == (2, "")
    stages["raises"] = InputError("known to this process only")
    result = invoke("train")
    assert result.stderr.endswith("error: known to this process only\n")


@pytest.mark.parametrize("command", ["precompute", "train"])
def test_num_processes_launches_unless_already_a_child(
    command: str, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwen_lora.launch

    launched: list[Any] = []

    def launch(argv: Any, count: int) -> int:
        launched.append((list(argv), count))
        return 143

    monkeypatch.setattr(qwen_lora.launch, "launch_processes", launch)
    monkeypatch.setattr(sys, "argv", ["qwen-lora", command, "--num-processes", "3"])
    result = invoke(command, "--num-processes", "3")
    assert result.exit_code == 143
    assert launched == [([command, "--num-processes", "3"], 3)]
    assert command not in stages and result.stderr == ""

    monkeypatch.setenv("RANK", "0")
    assert invoke(command, "--num-processes", "3").exit_code == 0
    assert len(launched) == 1 and stages[command].num_processes == 3


def test_a_dry_run_launches_nothing(
    stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwen_lora.launch

    monkeypatch.setattr(qwen_lora.launch, "launch_processes", None)
    assert invoke("precompute", "--num-processes", "3", "--dry-run").exit_code == 0
    assert stages["precompute"].num_processes == 3


# ---- the other commands ----------------------------------------------------------------------


def test_init_writes_a_file_that_loads_and_never_overwrites() -> None:
    result = invoke("init")
    assert result.exit_code == 0
    assert load_settings("train", Path("lora.yaml")) == Settings()
    before = Path("lora.yaml").read_bytes()
    result = invoke("init")
    assert (result.exit_code, Path("lora.yaml").read_bytes()) == (2, before)
    assert result.stderr == "error: lora.yaml exists; name another file or remove it\n"
    assert invoke("init", "no/such/folder.yaml").exit_code == 2
    assert invoke("init", "mine.yaml").exit_code == 0
    assert "--config mine.yaml" in Path("mine.yaml").read_text()


def test_tiny_model(tmp_path: Path) -> None:
    result = invoke("tiny-model", "tiny", "--seed", "3")
    assert (result.exit_code, result.stdout) == (0, "tiny\n")
    assert (tmp_path / "tiny" / "model_index.json").is_file()
    result = invoke("tiny-model", "tiny")
    assert result.exit_code == 2
    assert result.stderr == "error: tiny exists and is not an empty folder; name another\n"


def test_sample(tiny_model: Path) -> None:
    result = invoke(
        "sample", "--model", tiny_model, "--prompt", "a red boat", "--seed", "1", "--seed", "2",
        "--output", "boats.png", "--steps", "2", "--height", "64", "--width", "64",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "boats.png\n"), result.output
    assert Path("boats.png").stat().st_size > 1000
    result = invoke("sample", "--model", tiny_model, "--prompt", "x", "--output", "x.png",
                    "--lora", "absent.safetensors")  # fmt: skip
    assert (result.exit_code, result.stderr) == (2, "error: no LoRA file at absent.safetensors\n")


def test_the_module_runs_as_a_program_and_dies_quietly_on_a_closed_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "qwen_lora.cli"]
    bad = subprocess.run(
        [*command, "train", "--set", "rank=x"], capture_output=True, text=True, env=environment
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: --set rank: must be a whole number, not x\n"

    reader, writer = os.pipe()
    os.close(reader)
    piped = subprocess.run(
        [*command, "init"], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writer)
    assert piped.stderr == ""
