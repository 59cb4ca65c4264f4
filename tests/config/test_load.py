"""Settings from YAML, --set and options; every kind of mistake, reported together."""

from pathlib import Path
from typing import Any

import pytest

from qwen_lora.config.load import SettingsError, explicit_keys, load_settings
from qwen_lora.config.names import fields, nearest
from qwen_lora.config.schema import Settings, ShardSource
from qwen_lora.errors import InputError

FILES = Path(__file__).parent / "files"
RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def load(
    tmp_path: Path, text: str = "", set_options: Any = (), command: Any = "train", **options: Any
) -> Settings:
    file = tmp_path / "lora.yaml"
    file.write_text(text, encoding="utf-8")
    named = {key.replace("__", "."): value for key, value in options.items()}
    return load_settings(command, file, set_options, named, notes=[])


def problem(tmp_path: Path, text: str = "", set_options: Any = (), **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, set_options, **more)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- files that exist ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["precompute", "train"])
def test_the_common_file_works_as_it_stands(command: Any) -> None:
    notes: list[str] = []
    settings = load_settings(command, FILES / "common.yaml", notes=notes)
    assert notes == []
    assert settings.pretrained_model_name_or_path == "Qwen/Qwen-Image"
    assert settings.data_config.img_dir == Path("your_lora_dataset")
    assert settings.data_config.img_size == [1024]
    assert settings.data_config.caption_dropout_rate == 0.1
    assert settings.data_config.random_ratio is False
    assert settings.data_config.caption_type == "txt"
    assert settings.learning_rate == 1e-4
    assert settings.mixed_precision == "bf16"
    assert settings.checkpoints_total_limit == 10
    assert settings.output_dir == Path("output")
    assert settings.shards_dir == Path("shards")


@pytest.mark.parametrize("command", ["precompute", "train"])
def test_another_trainers_file_is_mapped_or_explained(command: Any) -> None:
    notes: list[str] = []
    settings = load_settings(command, FILES / "other-trainer.yaml", notes=notes)
    assert settings.optimizer == "adamw8bit"
    assert settings.base_precision == "int8"
    assert settings.train_batch_size == 2
    assert settings.decode_workers == 1
    assert settings.report_to == ["wandb"]
    assert settings.tracker_project_name == "lora_test"
    assert (settings.adam_beta2, settings.adam_weight_decay) == (0.95, 0.02)
    assert (settings.adam_epsilon, settings.max_grad_norm) == (1e-7, 0.5)
    assert settings.resume_from_checkpoint == "latest"
    assert settings.logging_dir == Path("logs")
    explained = ["precompute_text_embeddings", "precompute_image_embeddings", "save_cache_on_disk"]
    explained += ["wandb_run_name", "wandb_tags", "wandb_project_name", "quantize", "adam8bit"]
    for key in explained:
        assert sum(note.startswith(key) for note in notes) == 1, key
    assert any("lr_warmup_steps" in note for note in notes) == (command == "train")


@pytest.mark.parametrize("command", ["precompute", "train"])
@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(file: Path, command: Any) -> None:
    notes: list[str] = []
    settings = load_settings(command, file, notes=notes)
    assert notes == []
    assert settings.data_config.img_dir is not None
    assert len(explicit_keys(settings)) >= 8


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


# ---- values mean what they say ---------------------------------------------------------------


def test_scalars_are_read_by_the_fields_type(tmp_path: Path) -> None:
    text = """
mixed_precision: no
learning_rate: 1e-4
use_rslora: on
gradient_checkpointing: off
tracker_project_name: 1e3
data_config:
  trigger_word: yes
  img_size: 1_024
  caption_dropout_rate: .5
  group_weights: {on: 2, "1": 0.5}
timestep_shift: 1.15
lr_step_rules: 1:10,0.1
lora_alpha: ~
"""
    settings = load(tmp_path, text + "lr_scheduler: piecewise_constant\n")
    assert settings.mixed_precision == "no"
    assert settings.learning_rate == 1e-4
    assert settings.use_rslora is True
    assert settings.gradient_checkpointing is False
    assert settings.tracker_project_name == "1e3"
    assert settings.data_config.trigger_word == "yes"
    assert settings.data_config.img_size == [1024]
    assert settings.data_config.caption_dropout_rate == 0.5
    assert settings.data_config.group_weights == {"on": 2.0, "1": 0.5}
    assert settings.timestep_shift == 1.15
    assert settings.lr_step_rules == "1:10,0.1"
    assert settings.lora_alpha is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("report_to: none", []),
        ("report_to: null", []),
        ("report_to: tensorboard", ["tensorboard"]),
        ("report_to: tensorboard,wandb", ["tensorboard", "wandb"]),
        ("report_to: [wandb]", ["wandb"]),
    ],
)
def test_report_to(text: str, expected: list[str], tmp_path: Path) -> None:
    assert load(tmp_path, text).report_to == expected


def test_shards_as_text_or_with_weight(tmp_path: Path) -> None:
    settings = load(tmp_path, "shards: [one, {path: ~/two, weight: 2.5}]")
    two = ShardSource(path=Path.home() / "two", weight=2.5)
    assert settings.shards == [ShardSource(path=Path("one")), two]
    assert load(tmp_path, "shards: one").shards == [ShardSource(path=Path("one"))]


def test_optimizer_arguments_get_types(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "optimizer_args: {amsgrad: true, betas: [0.9, 0.99], foreach: false, mode: fast}",
        ["optimizer_args.d0=1e-6", "optimizer_args.steps=3"],
    )
    expected = {"amsgrad": True, "betas": [0.9, 0.99], "foreach": False, "mode": "fast"}
    assert settings.optimizer_args == {**expected, "d0": 1e-6, "steps": 3}
    assert type(settings.optimizer_args["steps"]) is int


@pytest.mark.parametrize(
    ("scheme", "sampling", "weighting"),
    [
        ("none", "none", "none"),
        ("logit_normal", "logit_normal", "none"),
        ("mode", "mode", "none"),
        ("sigma_sqrt", "none", "sigma_sqrt"),
        ("cosmap", "none", "cosmap"),
    ],
)
def test_weighting_scheme(scheme: str, sampling: str, weighting: str, tmp_path: Path) -> None:
    settings = load(tmp_path, f"weighting_scheme: {scheme}")
    assert (settings.timestep_sampling, settings.loss_weighting) == (sampling, weighting)


# ---- precedence ------------------------------------------------------------------------------


def test_precedence(tmp_path: Path) -> None:
    assert load(tmp_path).rank == 16
    assert load(tmp_path, "rank: 4").rank == 4
    assert load(tmp_path, "rank: 4", ["rank=8"]).rank == 8
    assert load(tmp_path, "rank: 4", rank=32).rank == 32
    assert load(tmp_path, "rank: 4", ["rank="]).rank == 16  # empty: the default
    assert load(tmp_path, "weighting_scheme: mode", ["weighting_scheme=none"]) == Settings()
    given = load(tmp_path, "data_config: {img_size: 512}", data_config__img_size=[256, 384])
    assert given.data_config.img_size == [256, 384]


def test_the_same_value_twice_is_no_conflict(tmp_path: Path) -> None:
    assert load(tmp_path, "", ["learning_rate=1e-4", "rank=8"], rank=8).rank == 8
    same = load(tmp_path, "", ["data_config.img_size=512"], data_config__img_size=[512])
    assert same.data_config.img_size == [512]
    text = problem(tmp_path, "", ["rank=8"], rank=4)
    assert text == "rank: --set says 8, the option says 4"


def test_set_reads_any_key(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "",
        ["data_config.caption_dropout_rate=0.2", "lora_targets=[to_q, to_k]", "shards=a,b",
         "data_config.group_weights.a.b=3", "tracker_project_name='a: b'"],
    )  # fmt: skip
    assert settings.data_config.caption_dropout_rate == 0.2
    assert settings.lora_targets == ["to_q", "to_k"]
    assert [source.path.name for source in settings.shards] == ["a", "b"]
    assert settings.data_config.group_weights == {"a.b": 3.0}
    assert settings.tracker_project_name == "a: b"


def test_a_section_in_set_needs_keys_and_each_key_one_value(tmp_path: Path) -> None:
    assert "data_config.KEY" in problem(tmp_path, set_options=["data_config=5"])
    twice = ["data_config.flip=none", "data_config={flip: both}"]
    assert "data_config.flip: given twice" in problem(tmp_path, set_options=twice)


def test_explicit_keys_are_what_was_given(tmp_path: Path) -> None:
    settings = load(tmp_path, "rank: 16\ndata_config: {img_size: 1024, flip: null}", ["seed=1"])
    assert explicit_keys(settings) == {"rank", "seed", "data_config.img_size"}


# ---- mistakes --------------------------------------------------------------------------------


def test_all_problems_at_once_each_with_key_line_and_nearest(tmp_path: Path) -> None:
    text = """rank: 2.5
learning_rat: 1e-4
data_config:
  img_sise: 512
  random_ratio: maybe
lora_init: gausian
mode_scale: 1.29
timestep_shift: fast
"""
    lines = problem(tmp_path, text, ["max_train_stepz=1", "nonsense"], rank=0).splitlines()
    assert lines[0] == "9 problems in the settings"
    file = tmp_path / "lora.yaml"
    for line in (
        "--set nonsense: must be key=value",
        f"{file}, line 2: learning_rat: unknown key; the nearest known one is learning_rate",
        f"{file}, line 4: data_config.img_sise: unknown key; the nearest known one is "
        "data_config.img_size",
        "--set max_train_stepz: unknown key; the nearest known one is max_train_steps",
        "rank: must be greater than or equal to 1, not 0",
        f"{file}, line 5: data_config.random_ratio: must be true or false, not maybe",
        f"{file}, line 6: lora_init: must be 'gaussian', 'kaiming' or 'orthogonal', not gausian",
        f"{file}, line 8: timestep_shift: must be a number or must be 'none' or 'model', not fast",
        f"{file}, line 7: mode_scale: has no effect here; it needs timestep_sampling: mode",
    ):
        assert f"  {line}" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nrank: 8", "rank: given twice, on lines 1 and 2"),
        ("data_config: {flip: none, flip: both}", "data_config.flip: given twice"),
        (
            "data_config.flip: none\ndata_config: {flip: both}",
            "data_config.flip: given twice, with a dot and in data_config",
        ),
        ("data_config: {img_dir: [a, b]}", "data_config.img_dir: must be a path, not [a, b]"),
        ("seed: 9223372036854775808", "seed: must be less than"),
        ("rank: [1", "is not YAML"),
        ("- rank", "not a list of `key: value` lines"),
        ("rank: 1\n---\nrank: 2", "is not YAML"),
        ("rank: !!python/object/apply:os.getcwd []", "tags such as"),
        ("optimizer_args: &a {x: *a}", "alias that contains itself"),
        ("? [a, b]\n: 1", "a key must be plain text"),
        ("data_config: 3", "data_config: must hold `key: value` lines"),
        ("data_config: {img_size: []}", "must have an entry"),
        ("data_config: {img_size: [512, x]}", "entry 2 must be a whole number"),
        ("data_config: {img_size: 8}", "greater than or equal to 16"),
        ("data_config: {alpha_background: red}", "must look like #ffffff"),
        ("data_config: {group_weights: {a: -1}}", "greater than 0"),
        ("learning_rate: inf", "must be a finite number"),
        ("learning_rate: nan", "must be a finite number"),
        ("shards: [s3://me:x@bucket/set]", "holds credentials"),
        ("output_dir: s3://bucket/run", "is a URL"),
        ("shards: [{weight: 2}]", "path is missing"),
        ("shards: [a, {path: a}]", "a is given twice"),
        ("output_dir: ''", "a path is needed"),
        ("optimizer: adam", "adamw, adamw8bit, prodigy or module.Class"),
        ("lora_targets: []", "names no module"),
        ("lr_scheduler: warm", "'constant_with_warmup'"),
        ("weighting_scheme: cosine", "must be one of none, logit_normal"),
        ("weighting_scheme: cosmap\nloss_weighting: none", "weighting_scheme: cosmap means"),
        ("quantize: perhaps", "quantize: must be true or false"),
        ("quantize: true\nbase_precision: nf4", "but base_precision is nf4"),
        ("train_batch_size: 2\ndata_config: {train_batch_size: 4}", "but train_batch_size is 2"),
        ("lr_scheduler: piecewise_constant", "needs rules"),
        ("lr_scheduler: linear\nlr_warmup_steps: 50\nmax_train_steps: 9", "more than max_train"),
    ],
)
def test_single_mistakes(text: str, message: str, tmp_path: Path) -> None:
    told = problem(tmp_path, text)
    assert message in told and "\n" not in told


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ("mode_scale: 1.0\ntimestep_sampling: logit_normal", "timestep_sampling: mode"),
        ("logit_mean: 0.0", "timestep_sampling: logit_normal"),
        ("logit_std: 2", "timestep_sampling: logit_normal"),
        ("lr_num_cycles: 2\nlr_scheduler: cosine", "lr_scheduler: cosine_with_restarts"),
        ("lr_power: 2", "lr_scheduler: polynomial"),
        ("lr_step_rules: 1:2,3", "lr_scheduler: piecewise_constant"),
        ("validation_steps: 0\nvalidation_max_images: 4", "validation_steps above 0"),
    ],
)
def test_no_effect_is_an_error_for_train_only(given: str, needs: str, tmp_path: Path) -> None:
    told = problem(tmp_path, given)
    assert told.endswith(f"has no effect here; it needs {needs}")
    load(tmp_path, given, command="precompute")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data_config: {square: true, min_aspect: 0.5}", "it needs data_config.square: false"),
        ("data_config: {square: true, random_ratio: true}", "contradicts data_config.square"),
        ("data_config: {img_size: [512, 512]}", "a resolution twice"),
        (
            "encoder_placement: offload\ntext_encoder_quantization: nf4",
            "cannot be streamed from host memory",
        ),
    ],
)
def test_contradictions_of_precompute(given: str, message: str, tmp_path: Path) -> None:
    assert message in problem(tmp_path, given, command="precompute")
    load(tmp_path, given, command="train")


def test_warmup_of_a_constant_schedule_is_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    load_settings("train", None, ["lr_warmup_steps=10"], notes=notes)
    assert notes == [
        "lr_warmup_steps: has no effect with lr_scheduler: constant; constant_with_warmup warms up"
    ]


@pytest.mark.parametrize("kind", ["absent", "folder", "binary", "huge"])
def test_files_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    if kind == "folder":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"rank: \xff\xfe")
    elif kind == "huge":
        file.write_bytes(b"#" * (1 << 21))
    with pytest.raises(InputError, match="settings file") as caught:
        load_settings("train", file)
    assert "\n" not in str(caught.value)


def test_deep_and_exploding_files_end_in_one_line(tmp_path: Path) -> None:
    assert "not YAML" in problem(tmp_path, "a: " + "[" * 5000)
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "more than 100,000 values" in problem(tmp_path, "\n".join(levels))


def test_notes_go_to_stderr_without_a_list(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    load_settings("train", None, ["adam8bit=true"])
    assert capsys.readouterr().err == "note: adam8bit: true is read as optimizer: adamw8bit\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("img_size", "data_config.img_size"),
        ("data_config.rank", "rank"),
        ("lr", "learning_rate"),
        ("network_dim", "rank"),
        ("Max-Train-Steps", "max_train_steps"),
        ("data_config.caption_dropout", "data_config.caption_dropout_rate"),
    ],
)
def test_nearest(typed: str, meant: str) -> None:
    assert nearest(typed) == meant


def test_every_setting_says_what_it_is() -> None:
    for key, info in fields().items():
        assert info.description, key
        assert info.description.rstrip(")").endswith((".", "0.01")), key


def test_problems_are_settings_errors(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        load(tmp_path, "rank: x")


def test_prodigy_with_a_small_learning_rate_is_noted() -> None:
    notes: list[str] = []
    load_settings("train", None, ["optimizer=prodigy"], notes=notes)
    assert any("Prodigy" in note for note in notes)
    notes.clear()
    load_settings("train", None, ["optimizer=prodigy", "learning_rate=1"], notes=notes)
    assert not notes
