"""What a run refuses or foretells before an encoder is loaded."""

import errno
import json
import shutil

import pytest

from qwen_lora.errors import InputError, QwenLoraError, ShardError
from qwen_lora.models import resolve_model
from qwen_lora.posix import exclusive_lock
from qwen_lora.precompute import plan
from qwen_lora.precompute.remembered import RememberedSources
from qwen_lora.precompute.run import precompute
from qwen_lora.shards.reader import ShardSet


def test_another_fingerprint_or_recipe_is_refused(make_settings, dataset, no_encoders):
    data = {"img_dir": dataset}
    precompute(make_settings(data))
    no_encoders()
    with pytest.raises(InputError, match=r"text.compute_dtype bfloat16 -> float32"):
        precompute(make_settings(data, text_encoder_dtype="float32"))
    with pytest.raises(InputError, match=r"flip none -> both"):
        precompute(make_settings({**data, "flip": "both"}))
    with pytest.raises(InputError, match=r"resolutions can be added, not taken away"):
        precompute(make_settings({**data, "img_size": [64]}))


def test_another_model_is_refused(make_settings, dataset, tiny_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = other / "vae" / "config.json"
    facts = json.loads(config.read_text())
    facts["latents_mean"][0] += 0.5
    config.write_text(json.dumps(facts))
    precompute(make_settings({"img_dir": dataset}))
    with pytest.raises(InputError, match=r"vae\.config\.latents_mean"):
        precompute(make_settings({"img_dir": dataset}, pretrained_model_name_or_path=str(other)))


def test_too_little_space_is_said_before_a_model_is_loaded(make_settings, no_encoders, monkeypatch):
    monkeypatch.setattr("qwen_lora.precompute.lead.free_space", lambda folder: 1000)
    no_encoders()
    with pytest.raises(InputError, match=r"need .* MiB but .* 0.0 MiB free"):
        precompute(make_settings())


def test_a_second_run_at_once_is_refused(make_settings):
    settings = make_settings()
    local = settings.shards_dir / ".local"
    local.mkdir(parents=True)
    with (
        exclusive_lock(local / "lock", "the shard set"),
        pytest.raises(InputError, match="in use by process"),
    ):
        precompute(settings)


def test_a_missing_dataset_leaves_nothing_behind(make_settings, tmp_path):
    settings = make_settings({"img_dir": tmp_path / "nothing-here"})
    with pytest.raises(InputError, match="nothing-here does not exist"):
        precompute(settings)
    with pytest.raises(InputError, match="no dataset"):
        precompute(make_settings({"img_dir": None}))
    assert not settings.shards_dir.exists()


def test_output_inside_the_dataset_is_refused(make_settings, dataset):
    with pytest.raises(InputError, match="lies inside the dataset"):
        precompute(make_settings({"img_dir": dataset}, shards_dir=dataset / "shards"))


@pytest.mark.parametrize("place", ["file", "file/shards"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_output_that_cannot_be_is_one_line(make_settings, tmp_path, no_encoders, place, dry_run):
    (tmp_path / "file").write_text("in the way")
    no_encoders()
    with pytest.raises(InputError, match=r"the output .*file.* cannot be used"):
        precompute(make_settings(shards_dir=tmp_path / place), dry_run=dry_run)


def test_a_full_disk_is_one_line(make_settings, monkeypatch, no_encoders):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = make_settings()
    no_encoders()
    with monkeypatch.context() as patched:
        patched.setattr("qwen_lora.precompute.run.write_atomic", full)
        with pytest.raises(InputError, match="No space left on device"):
            precompute(settings)
    monkeypatch.setattr("qwen_lora.precompute.remembered.write_atomic", full)
    with pytest.raises(InputError, match="No space left on device"):
        precompute(settings)


def test_a_disk_that_fills_at_the_end_keeps_what_is_done(make_settings, monkeypatch, published):
    settings = make_settings()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("qwen_lora.precompute.lead.publish_manifest", full)
        with pytest.raises(QwenLoraError, match="the same command continues") as caught:
            precompute(settings)
    assert caught.value.exit_code == 1
    assert precompute(settings).samples == 12


def test_what_a_set_leaves_out_stays_so(make_settings, dataset):
    """A rerun cannot take captions or names out of the shards that are there."""
    data = {"img_dir": dataset}
    precompute(make_settings(data))
    with pytest.raises(InputError, match="captions_in_shards True -> False"):
        precompute(make_settings(data, captions_in_shards=False))
    with pytest.raises(InputError, match="source_names True -> False"):
        precompute(make_settings(data, source_names=False), dry_run=True)
    bare = make_settings(data).shards_dir.with_name("bare")
    precompute(make_settings(data, captions_in_shards=False, shards_dir=bare))
    with pytest.raises(InputError, match="captions_in_shards False -> True"):
        precompute(make_settings(data, shards_dir=bare))
    again = precompute(make_settings(data, captions_in_shards=False, shards_dir=bare))
    assert (again.unchanged, again.exit_code) == (4, 0)


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_set_without_one_of_its_shards_gets_no_generation(make_settings, dataset, damage):
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    shard = next(settings.shards_dir.glob("shard-*.tar"))
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut off":
        shard.write_bytes(content[:-512])
    (dataset / "00.txt").write_text("another caption")
    for dry_run in (True, False):
        with pytest.raises(ShardError, match=f"{shard.name} (is missing|has .* bytes)"):
            precompute(settings, dry_run=dry_run)
    shard.write_bytes(content)
    assert precompute(settings).written == 1


def test_captions_that_are_cut_off_are_told(make_settings, dataset, capsys):
    (dataset / "00.txt").write_text("x y " * 900)
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    assert "hint: 1 captions are longer than the model reads" in capsys.readouterr().err
    precompute(settings)
    assert "longer than" not in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would(make_settings, dataset):
    data = {"img_dir": dataset}
    precompute(make_settings(data))
    with pytest.raises(InputError, match="vae.posterior mode -> mean_std"):
        precompute(make_settings(data, vae_posterior="mean_std"), dry_run=True)
    with pytest.raises(InputError, match="vae.alpha_background"):
        changed = make_settings({**data, "alpha_background": "#000000"})
        precompute(changed, dry_run=True)


def test_a_dry_run_counts_live_samples(make_settings, dataset):
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    (dataset / "00.txt").write_text("another caption")
    foretold = precompute(settings, dry_run=True)
    done = precompute(settings)
    assert (foretold.samples, foretold.samples_written) == (done.samples, done.samples_written)
    assert (done.samples, done.samples_written) == (4, 1)
    assert precompute(settings, dry_run=True).samples == 4


def test_dry_run_tells_and_writes_nothing(make_settings, dataset, no_encoders, capsys):
    (dataset / "bad\n.png").write_text("no picture")
    (dataset / "bad\n.txt").write_text("a caption")
    settings = make_settings({"img_dir": dataset})
    no_encoders()
    summary = precompute(settings, dry_run=True)
    text = capsys.readouterr().out
    assert not settings.shards_dir.exists()
    assert (summary.written, summary.skipped) == (4, 1)
    assert any(line.startswith("bad\\") and "undecodable" in line for line in text.splitlines())
    assert "MiB needed" in text and "free" in text
    assert "96 x 96" in text


def test_a_dry_run_knows_what_is_there(make_settings, dataset, image_folder, published):
    settings = make_settings({"img_dir": dataset})
    precompute(settings)
    for name in ("06.png", "06.txt"):
        shutil.copy(image_folder / name, dataset)
    before = published(settings.shards_dir)
    summary = precompute(settings, dry_run=True)
    assert (summary.written, summary.unchanged) == (1, 4)
    assert published(settings.shards_dir) == before


@pytest.mark.parametrize("posterior", ["mode", "mean_std"])
def test_sizes_are_predicted_to_the_byte(make_settings, tiny_model, tmp_path, posterior):
    settings = make_settings(vae_posterior=posterior)
    precompute(settings)
    shards = ShardSet.open(settings.shards_dir)
    sizes = {entry.tar.name: entry.tar.bytes for entry in shards.manifest.shards}
    fingerprint = shards.manifest.fingerprint
    ids = {}
    for row, sample_id in enumerate(shards.table.sample_id):
        ids[sample_id] = shards.manifest.shards[shards.table.shard[row]].tar.name
    shards.close()

    model = resolve_model(str(tiny_model), plan.ENCODER_PARTS)
    remembered = RememberedSources(tmp_path / "none.json", {})
    images = plan.accept_images(plan.scan(settings), settings, 16, remembered)
    wanted = plan.name_samples(images, fingerprint)
    planned = plan.plan_shards(list(wanted.samples.values()), model, settings)
    for shard in planned:
        names = {ids[item.sample_id] for item in shard}
        assert len(names) == 1
        end = sum(item.predicted_bytes for item in shard) + 1024
        assert sizes[names.pop()] == -(-end // 10240) * 10240
    assert plan.needed_bytes(planned, sequential=False) >= sum(sizes.values())
