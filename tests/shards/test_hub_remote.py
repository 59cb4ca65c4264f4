"""Sets in repositories of a hub: a server that answers as the Hugging Face hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwen_lora.errors import InputError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote import open_remote

from .conftest import write_set
from .fault_server import serve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canaryCanaryCanary"
READ = """
import sys
from pathlib import Path
from qwen_lora.errors import QwenLoraError
from qwen_lora.shards.reader import ShardSet
from qwen_lora.shards.remote.cache import ShardCache
from qwen_lora.shards.verify import verify
try:
    with ShardSet.open(sys.argv[1], cache=ShardCache(Path(sys.argv[2]), 1 << 30)) as shards:
        for row in range(len(shards)):
            shards.read_bytes(row)
        print(len(shards), shards.store.label, len(shards.store.names()))
except QwenLoraError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@contextmanager
def hub(folder: Path, files_at: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A hub with the dataset owner/name, whose files lie on another host, at `files_at`."""
    log: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            log.append((self.path, self.headers.get("Authorization")))
            path = self.path.partition("?")[0]
            tree = f"/api/datasets/owner/name/tree/{COMMIT}/sets%2Fone"
            resolve = f"/datasets/owner/name/resolve/{COMMIT}/sets/one/"
            if path in ("/api/datasets/owner/name", "/api/datasets/owner/name/revision/v2"):
                self._json({"id": "owner/name", "sha": COMMIT})
            elif path == tree:
                names = sorted(each.name for each in folder.iterdir() if each.is_file())
                self._json(
                    [
                        {"type": "file", "path": f"sets/one/{name}", "size": 1, "oid": "0"}
                        for name in names
                    ]
                )
            elif path.startswith(resolve):
                self.send_response(302)
                self.send_header("Location", f"{files_at}/{path.removeprefix(resolve)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _json(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(url: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-c", READ, url, str(cache)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("revision", ["", "@v2"])
def test_a_set_is_read_at_one_commit(shard_set: Path, tmp_path: Path, revision: str) -> None:
    url = f"hf://datasets/owner/name{revision}/sets/one"
    with serve(shard_set) as files, hub(shard_set, files.url) as (endpoint, log):
        result = read(url, endpoint, tmp_path / "cache")
        assert (result.returncode, result.stderr) == (0, "")
        count = sum(path.is_file() for path in shard_set.iterdir())
        assert result.stdout == f"9 {url} {count}\n"
        resolved = [path for path, _ in log if "/resolve/" in path]
        assert resolved and all(COMMIT in path for path in resolved)
        assert {token for path, token in log if "owner" in path} == {f"Bearer {TOKEN}"}
        assert files.log and not any("authorization" in headers for _, headers in files.log)


def test_what_is_not_there(shard_set: Path, tmp_path: Path) -> None:
    with hub(shard_set, "http://127.0.0.1:1") as (endpoint, _):
        result = read("hf://datasets/owner/nothing", endpoint, tmp_path / "cache")
    assert result.returncode == 1
    assert result.stderr == (
        "InputError: hf://datasets/owner/nothing: is no dataset repository that can be read "
        "(private: set HF_TOKEN)\n"
    )


def test_no_hub(tmp_path: Path) -> None:
    result = read("hf://datasets/owner/name", "http://127.0.0.1:1", tmp_path / "cache")
    assert result.returncode == 1
    assert result.stderr.startswith("RemoteError: hf://datasets/owner/name: the hub cannot be")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["hf://datasets", "hf://a", "hf://datasets/a/b@", "hf://a/b@c@d/e"])
def test_odd_addresses(url: str) -> None:
    with pytest.raises(InputError, match="expected hf://datasets/owner/name"):
        open_remote(url)


def test_offline_is_said() -> None:
    with pytest.raises(InputError, match="cannot be read while HF_HUB_OFFLINE is set"):
        ShardSet.open("hf://datasets/owner/name")


TOOLS = """
import sys
from typer.testing import CliRunner
from qwen_lora.cli import app
here, there = sys.argv[1:3]
look = (["info"], ["list", "--json"], ["verify", "--deep"], ["merge", "--output", "merged"])
for words in look:
    said = []
    for place in (there, here):
        result = CliRunner().invoke(app, ["shards", words[0], place, *words[1:]])
        assert result.exit_code == 0, result.output
        said.append(result.stdout.replace(place, "SET"))
    if words[0] != "merge":
        assert said[0] == said[1], said
assert "0 of them new" in said[1] and "2 duplicates" in said[1], said
for words in (["prune", there], ["merge", here, "--output", there]):
    result = CliRunner().invoke(app, ["shards", *words])
    assert (result.exit_code, result.output.count("error: ")) == (2, 1), result.output
    assert f"{there} can only be read" in result.output
"""


def test_the_tools_take_its_address(tmp_path: Path) -> None:
    folder, url = write_set(tmp_path / "set", count=2), "hf://datasets/owner/name/sets/one"
    with serve(folder) as files, hub(folder, files.url) as (endpoint, _):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", TOOLS, str(folder), url],
            env={**environment, "HF_TOKEN": TOKEN, "QWEN_LORA_CACHE": str(tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 0, result.stderr
