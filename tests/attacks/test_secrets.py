"""Canaries: secrets reach no output, and nothing that people share tells of this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

TOKENS = {  # in the environment of every command here
    "HF_TOKEN": "hf_CanaryTokenOfTheHub0123456789",
    "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "CanarySecretKey/of+S3/0123456789",
    "AWS_SESSION_TOKEN": "CanarySessionToken==0123456789",
    "WANDB_API_KEY": "CanaryKeyOfATracker0123456789",
}
URL_SECRETS = ("CanaryUser", "CanaryPassword", "CanarySignature", "CanaryUrlToken")
QUERY = "X-Amz-Signature=CanarySignature&token=CanaryUrlToken"
USER, HOST = "canaryperson", "canaryhost"
CAPTION, PICTURE, GROUP = "zebrafinchcaption", "walrusfilename", "ottergroup"

# The machine's names, as a process may ask for them.
PROGRAM = f"""
import json, os, platform, socket, sys
names = os.uname()
os.uname = lambda: os.uname_result((names[0], "{HOST}", *names[2:]))
platform.node = socket.gethostname = socket.getfqdn = lambda *_: "{HOST}"
from qwen_lora.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[:] = ["qwen-lora", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def command(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    return commands([arguments], home)


def commands(each: Sequence[Sequence[str | Path]], home: Path) -> subprocess.CompletedProcess[str]:
    """Several command lines one after the other, up to the first that fails."""
    environment = os.environ | TOKENS
    environment |= {"USER": USER, "LOGNAME": USER, "HOME": str(home), "HOSTNAME": HOST}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(home / "cache"), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([[*map(str, one)] for one in each])],
        env=environment,
        capture_output=True,
        text=True,
        cwd=home,
        timeout=300,
    )


def spellings(word: str) -> list[bytes]:
    """As text, in UTF-16, and in the middle of something base64."""
    found = [word.encode(), word.encode("utf-16-le")]
    for before in (b"", b"x", b"xx"):
        whole = base64.b64encode(before + word.encode())
        found.append(whole[4:-4] if before else whole.rstrip(b"=")[:-1])
    return found


def found_in(files: list[Path], words: list[str]) -> list[str]:
    """Which words stand in which files, names included."""
    hits = []
    for path in files:
        content = path.name.encode() + b"\n" + path.read_bytes()
        hits += [
            f"{word} in {path.name}" for word in words for s in spellings(word) if s in content
        ]
    return hits


@dataclass(frozen=True)
class Job:
    """One precompute and one training, with canaries everywhere."""

    home: Path
    shards: Path
    run: Path
    said: str  # by both commands

    def shared_shards(self) -> list[Path]:
        return [path for path in self.shards.iterdir() if path.is_file()]

    def shared_run(self) -> list[Path]:
        """What people pass on of a run; settings.yaml and the hidden files are this machine's."""
        kept = [path for path in self.run.rglob("*") if path.is_file()]
        return [p for p in kept if p.name != "settings.yaml" and not p.name.startswith(".")]

    def everything(self) -> list[Path]:
        folders = (self.shards, self.run, self.home / "cache")
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = tmp_path_factory.mktemp("canaryhome")
    images = home / "pictures" / GROUP
    images.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 20, 90)).save(images / f"{PICTURE}{number}.png")
        (images / f"{PICTURE}{number}.txt").write_text(f"{CAPTION} number {number}")
    precompute = [
        *("precompute", home / "pictures", "--model", tiny_model, "--output", home / "shards"),
        *("--resolution", "64", "--no-captions", "--no-source-names"),
        *("--set", "preview_prompts=[a red boat]"),
    ]
    train = [
        *("train", home / "shards", "--model", tiny_model, "--output", home / "run"),
        *("--max-train-steps", "1", "--rank", "2", "--set", "checkpointing_steps=1"),
        *("--set", "preview_steps=1", "--set", "preview_inference_steps=2"),
        *("--set", "report_to=tensorboard"),
    ]
    done = commands([precompute, train], home)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    return Job(home, home / "shards", home / "run", said)


def test_a_job_writes_and_says_no_secret(job: Job) -> None:
    words = [*TOKENS.values()]
    assert len(job.everything()) > 10
    assert found_in(job.everything(), words) == []
    assert [word for word in words if word in job.said] == []


def test_nothing_shared_tells_of_this_machine(job: Job) -> None:
    words = [USER, HOST, job.home.name, "canaryhome", str(ROOT), sys.prefix]
    assert found_in(job.shared_shards(), words) == []
    shared = job.shared_run()
    names = {path.name for path in shared}
    assert {"lora.safetensors", "report.html", "state.json", "metrics.jsonl"} <= names
    # TensorBoard itself names its files by the host.
    assert found_in([p for p in shared if "tfevents" not in p.name], words) == []


def test_without_captions_no_text_of_theirs_is_in_the_set(job: Job) -> None:
    words = [CAPTION, PICTURE]
    assert found_in(job.shared_shards(), words) == []
    assert found_in([p for p in job.shared_run() if p.suffix != ".txt"], words) == []
    asked = (["info"], ["info", "--json"], ["list"], ["list", "--json"], ["verify", "--deep"])
    done = commands([["shards", *one, job.shards] for one in asked], job.home)
    assert done.returncode == 0, done.stderr
    assert not [word for word in words if word in done.stdout + done.stderr]


def test_the_search_would_find_them(job: Job, tmp_path: Path) -> None:
    """The canaries were there to be found: in the dataset, and in this machine's own part."""
    pictures = [path for path in (job.home / "pictures").rglob("*") if path.is_file()]
    assert len(found_in(pictures, [CAPTION, PICTURE])) >= 8
    assert found_in([job.shards / ".local" / "settings.json"], ["canaryhome"])
    hidden = tmp_path / "x"
    for before in (b"", b"a", b"ab", b"abc"):
        hidden.write_bytes(base64.b64encode(before + TOKENS["HF_TOKEN"].encode() + b"more"))
        assert found_in([hidden], [TOKENS["HF_TOKEN"]])


# ---- URLs that hold secrets ----------------------------------------------------------------------


class Refuses(BaseHTTPRequestHandler):
    """Answers every request with the status in its path, and says the request back; below /signed
    it first redirects to a link as object stores sign them."""

    def do_GET(self) -> None:
        if self.path.startswith("/signed"):
            host = f"CanaryUser:CanaryPassword@127.0.0.1:{self.server.server_port}"
            self.send_response(302)
            self.send_header("Location", f"http://{host}{self.path[7:]}?{QUERY}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(int(self.path[1:4]) if self.path[1:4].isdecimal() else 404)
        body = json.dumps({"asked": self.path, "headers": dict(self.headers)}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """host:port of a server that lets nobody in."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        (f"http://CanaryUser:CanaryPassword@SERVER/404/set?{QUERY}", ("info",)),
        (f"http://SERVER/404/set?{QUERY}", ("merge", "--output", "merged")),
        ("http://SERVER/signed/403/set", ("list", "--urls")),
        ("http://SERVER/signed/404/set", ("verify", "--json")),
        ("http://SERVER/signed/200/set", ("info", "--json")),
        (f"s3://CanaryUser:CanaryPassword@bucket/set?{QUERY}", ("info",)),
        (f"hf://CanaryUser:CanaryPassword@datasets/x/y?{QUERY}", ("info",)),
    ],
)
def test_a_url_that_fails_is_told_without_its_secrets(
    server: str, url: str, asked: tuple[str, ...], tmp_path: Path
) -> None:
    url = url.replace("SERVER", server)
    done = command("shards", asked[0], url, *asked[1:], home=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said
    assert not [word for word in (*URL_SECRETS, *TOKENS.values()) if word in said]
    assert "Traceback" not in said and said.count("\n") <= 2 or "--json" in asked, said
    assert found_in([p for p in tmp_path.rglob("*") if p.is_file()], [*URL_SECRETS]) == []


def test_settings_with_such_urls(server: str, tiny_model: Path, tmp_path: Path) -> None:
    """In a settings file, as an option, beside mistakes, and as a model's name."""
    url = f"http://CanaryUser:CanaryPassword@{server}/404/set?{QUERY}"
    config = tmp_path / "lora.yaml"
    config.write_text(f"shards: ['{url}']\nnot_a_setting: '{url}'\n")
    tries = [
        ("train", "--config", config),
        ("train", url, "--model", tiny_model, "--output", tmp_path / "run"),
        ("train", "--set", f"rank={url}"),
        ("precompute", tmp_path, "--model", url),
    ]
    for arguments in tries:
        done = command(*arguments, home=tmp_path)
        said = done.stdout + done.stderr
        assert done.returncode in (1, 2), said
        assert not [word for word in (*URL_SECRETS, *TOKENS.values()) if word in said], said
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != config]
    assert found_in(written, [*URL_SECRETS]) == []
