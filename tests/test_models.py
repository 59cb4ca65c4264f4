"""Finding models: folders, hub ids, and everything a user can get wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_lora import weight_hashes as hashes
from qwen_lora.errors import InputError
from qwen_lora.hashing import sha256_file
from qwen_lora.models import resolve_model, weight_files
from qwen_lora.weight_hashes import weight_hashes

STAGE_1 = ["vae", "text_encoder", "tokenizer"]
STAGE_2 = ["transformer", "scheduler"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder(tiny_model: Path) -> None:
    model = resolve_model(str(tiny_model), STAGE_1 + STAGE_2)
    assert model.path == tiny_model
    assert model.revision is None
    assert model.model_id == tiny_model.name  # no absolute path: it is recorded in shard sets
    assert model.family.name == "qwen-image"
    assert model.config("scheduler")["max_shift"] == 0.9
    assert model.config("tokenizer")["tokenizer_class"] == "Qwen2Tokenizer"
    assert model.component("vae") == tiny_model / "vae"


def test_no_torch_is_imported(tiny_model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qwen_lora.models import *; "
        "from qwen_lora.weight_hashes import weight_hashes; "
        f"m = resolve_model({str(tiny_model)!r}, {STAGE_1!r}); weight_hashes(m.component('vae')); "
        "m.family.encoder_facts(m); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_component_that_is_absent(transformer_only: Path) -> None:
    with pytest.raises(InputError, match="no folder 'vae'"):
        resolve_model(str(transformer_only), STAGE_1)
    with pytest.raises(InputError, match="no folder 'vae'"):
        resolve_model(str(transformer_only), STAGE_2).component("vae")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "justaword", "a/b/c", "a/b@", ""])
def test_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="no such folder|no diffusers pipeline"):
        resolve_model(name, STAGE_2)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        resolve_model(str(tmp_path / "model.safetensors"), STAGE_2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no diffusers pipeline"),
        ('{"_class_name": "FluxPipeline"}', "'FluxPipeline' is not supported"),
        ("{}", "names no `_class_name`"),
        ("[]", "not a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_not_a_qwen_image_pipeline(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(InputError, match=message):
        resolve_model(str(tmp_path), STAGE_2)


def test_an_unreachable_hub_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="some-one/no-such-model@main is neither .*HF_HUB_OFFLINE"):
        resolve_model("some-one/no-such-model@main", STAGE_2)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "is gated; accept its terms"),
        ("RepositoryNotFoundError", "nor a public model"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(error: str, message: str, monkeypatch) -> None:
    import huggingface_hub

    def refuse(*args, **options):
        response = SimpleNamespace(headers={}, request=None)
        raise getattr(huggingface_hub.errors, error)("refused", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=message):
        resolve_model("some-one/model@v9", STAGE_2)


@pytest.fixture
def hub_cache(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache in huggingface_hub's own layout that holds the transformer of the tiny model."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--some-one--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    names = [Path("model_index.json")]
    for component in STAGE_2:
        names += [path.relative_to(tiny_model) for path in (tiny_model / component).iterdir()]
    for name in names:
        digest = sha256_file(tiny_model / name)
        blob = digest if name.suffix == ".safetensors" else digest[:40]  # git ids are 40 digits
        shutil.copy(tiny_model / name, repository / "blobs" / blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        link = os.path.relpath(repository / "blobs" / blob, (snapshot / name).parent)
        (snapshot / name).symlink_to(link)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("suffix", ["", "@main", f"@{COMMIT}"])
def test_a_cached_hub_id(suffix: str, hub_cache: Path) -> None:
    model = resolve_model(f"some-one/tiny{suffix}", STAGE_2)
    assert (model.path, model.model_id, model.revision) == (hub_cache, "some-one/tiny", COMMIT)


def test_a_hub_id_with_a_part_missing_offline(hub_cache: Path) -> None:
    with pytest.raises(
        InputError, match="cache has no vae, text_encoder, tokenizer of it; .*HF_HUB_OFFLINE"
    ):
        resolve_model("some-one/tiny", STAGE_1)


def test_only_the_asked_components_are_downloaded(hub_cache: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = {}

    def download(repo_id, *, revision, allow_patterns, local_files_only):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(hub_cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_model("some-one/tiny@abc", STAGE_2)
    assert (asked["repo_id"], asked["revision"]) == ("some-one/tiny", "abc")
    folders = {pattern.partition("/")[0] for pattern in asked["patterns"]}
    assert folders == {"model_index.json", *STAGE_2}
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked["patterns"])


def test_sharded_weights(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import QwenImageTransformer2DModel

    whole = QwenImageTransformer2DModel.from_pretrained(str(tiny_model / "transformer"))
    whole.save_pretrained(str(tmp_path / "transformer"), max_shard_size="2MB")
    shutil.copy(tiny_model / "model_index.json", tmp_path)
    files = weight_files(tmp_path / "transformer")
    assert len(files) > 1
    assert weight_hashes(tmp_path / "transformer") == {p.name: sha256_file(p) for p in files}
    model = resolve_model(str(tmp_path), ["transformer"])
    loaded = model.family.load_transformer(
        model, device=torch.device("cpu"), dtype=torch.float32, base_precision="bf16"
    )
    expected = whole.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name} is missing"):
        resolve_model(str(tmp_path), ["transformer"])


def test_weights_that_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    with pytest.raises(InputError, match="has no weights"):
        weight_files(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="reads safetensors"):
        weight_files(folder)
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no safetensors file beside it"):
        weight_files(folder)


def test_hub_blobs_are_not_read(hub_cache: Path, monkeypatch) -> None:
    (weights,) = (hub_cache / "transformer").glob("*.safetensors")
    expected = {weights.name: sha256_file(weights)}
    monkeypatch.setattr(hashes, "sha256_file", None)  # a call would raise
    assert weight_hashes(hub_cache / "transformer") == expected
