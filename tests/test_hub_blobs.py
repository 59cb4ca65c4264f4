"""Weights in the Hugging Face cache are named by their sha256: in huggingface_hub's own layout."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwen_lora import weight_hashes as hashes
from qwen_lora.weight_hashes import hub_sha256, weight_hashes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = b"these are the weights " * 1000
CONFIG = b"{}"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
NAME = "diffusion_pytorch_model.safetensors"
DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download
for name in sys.argv[1:]:
    print(hf_hub_download("some-one/tiny", name))
"""


class Hub(BaseHTTPRequestHandler):
    """Two files of one repository, with the headers that the hub sends of a file in Git LFS
    (`x-linked-etag` is its sha256) and of one that is not (`etag` is its Git id)."""

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        large = self.path.endswith(NAME)
        data = WEIGHTS if large else CONFIG
        git_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.send_response(200 if "/resolve/" in self.path else 404)
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("etag", f'"{git_id}"')
        if large:
            self.send_header("x-linked-etag", f'"{SHA256}"')
            self.send_header("x-linked-size", str(len(data)))
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if send:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def downloaded(hub: str, tmp_path: Path) -> Path:
    """The folder `vae` of a snapshot, as hf_hub_download leaves it."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HTTP_PROXY", "http_proxy"):
        environment.pop(name, None)
    environment["NO_PROXY"] = environment["no_proxy"] = "127.0.0.1"
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, f"vae/{NAME}", "vae/config.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    weights, config = map(Path, done.stdout.split())
    assert weights.parent == config.parent
    assert weights.read_bytes() == WEIGHTS
    return weights.parent


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "sha256_file", None)  # a call would raise


def test_a_downloaded_weight_file_is_named_by_its_sha256(downloaded: Path, tmp_path, monkeypatch):
    assert downloaded.parent.name == COMMIT
    assert hub_sha256(downloaded / NAME) == SHA256
    assert hub_sha256(downloaded / "config.json") is None  # its blob has a Git id
    assert hub_sha256(downloaded / "absent") is None
    linked = tmp_path / "linked"
    linked.symlink_to(downloaded)
    no_reading(monkeypatch)
    assert weight_hashes(downloaded) == weight_hashes(linked) == {NAME: SHA256}


def test_a_blob_that_repositories_share_is_named_by_its_first_link(downloaded, monkeypatch):
    """Newer versions keep Xet files once for all repositories, under a hash that is no sha256."""
    shared_blobs = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    blob = (downloaded / NAME).parent.joinpath(os.readlink(downloaded / NAME))
    xet_hash = "ab" * 32
    cache = downloaded.parents[3]
    published = shared_blobs.publish_blob_to_shared_store(
        blob_path=str(blob),
        xet_hash=xet_hash,
        cache_dir=str(cache),
        expected_size=len(WEIGHTS),
        replace_existing=False,
    )
    assert published and blob.is_symlink()
    assert (downloaded / NAME).resolve() == shared_blobs.shared_blob_path(cache.resolve(), xet_hash)
    assert (downloaded / NAME).read_bytes() == WEIGHTS
    no_reading(monkeypatch)
    assert weight_hashes(downloaded) == {NAME: SHA256}


def test_other_folders_named_blobs_prove_nothing(tmp_path: Path):
    wrong = "c" * 64
    blob = tmp_path / "blobs" / wrong
    blob.parent.mkdir()
    blob.write_bytes(WEIGHTS)
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / NAME).symlink_to(blob)
    state = tmp_path / "state.json"
    assert weight_hashes(folder, state) == {NAME: SHA256}
    (entry,) = json.loads(state.read_bytes()).values()
    facts = blob.stat()
    assert entry == [facts.st_size, facts.st_mtime_ns, facts.st_ino, SHA256]


def test_links_in_a_circle_end(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert hub_sha256(tmp_path / "a") is None
