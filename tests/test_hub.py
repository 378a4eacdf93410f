"""The door to the Hub, against a small server on this machine that speaks the few requests a download needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deltafmt.hub import looks_like_repo_id, split_repo_id

COMMIT = "c0ffee" + "0" * 34
TAGGED = "7a66ed" + "0" * 34
REVISIONS = {"main": COMMIT, "v1": TAGGED, COMMIT: COMMIT, TAGGED: TAGGED}
CONFIG = {"config.json": b'{"model_type": "x"}', "tokenizer/vocab.txt": b"a\nb\n"}
SAFETENSORS = {"model.safetensors": b"weights"}
TWINS = {
    "pytorch_model.bin": b"the same",
    "tf_model.h5": b"the same",
    "onnx/model.onnx": b"the same",
    "flax_model.msgpack": b"-",
}
REPOS = {"org/both": {**CONFIG, **SAFETENSORS, **TWINS}, "org/pickled": {**CONFIG, **TWINS}}


@dataclass
class Hub:
    """What the server saw, and how clients reach it."""

    url: str
    home: Path
    requests: list[str] = field(default_factory=list)

    def download(self, repo_id: str, **environment: str) -> dict[str, Any]:
        """Call `download` in a fresh process, since huggingface_hub reads its environment when it is imported."""
        program = """
import json, sys
from deltafmt.errors import DeltafmtError
from deltafmt.hub import download
lines = []
try:
    folder, commit = download(sys.argv[1], progress=lines.append)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"folder": str(folder), "commit": commit, "files": files, "lines": lines}))
except DeltafmtError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error), "exit": error.exit_code}))
"""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program, repo_id],
            env={**variables, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def answer(path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for a path, as the Hub gives them."""
    path = path.split("?")[0]
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        repo, action, revision = (
            "/".join(parts[2:4]),
            parts[4] if len(parts) > 4 else "revision",
            (parts[5:] or ["main"])[0],
        )
    else:
        repo, action, revision = "/".join(parts[:2]), "file", parts[3] if len(parts) > 3 else ""
    if repo == "org/gated":
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, b"{}"
    files = REPOS.get(repo)
    if files is None:
        return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
    commit = REVISIONS.get(revision)
    if commit is None:
        return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
    if action == "file":
        data = files["/".join(parts[4:])]
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data
    if action == "tree":
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return 200, {}, json.dumps(tree).encode()
    info = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "downloads": 0}
    return 200, {}, json.dumps({**info, "siblings": [{"rfilename": name} for name in files]}).encode()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = answer(self.path)
            seen.append(f"{self.command} {self.path}")
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                **headers,
                "Content-Length": str(len(body)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Hub(f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "home", seen)
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_leaves_the_same_weights_in_other_formats_out(hub: Hub) -> None:
    result = hub.download("org/both@v1")
    assert result["files"] == ["config.json", "model.safetensors", "tokenizer/vocab.txt"]
    assert result["commit"] == TAGGED
    folder = Path(result["folder"])
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "tokenizer" / "vocab.txt").read_bytes() == CONFIG["tokenizer/vocab.txt"]
    assert not [line for line in hub.requests if "onnx" in line or "pytorch_model" in line or ".h5" in line]
    assert any(TAGGED in line for line in result["lines"])


def test_a_pickle_is_kept_where_there_are_no_safetensors(hub: Hub) -> None:
    assert hub.download("org/pickled")["files"] == ["config.json", "pytorch_model.bin", "tokenizer/vocab.txt"]


def test_offline_the_cache_answers(hub: Hub) -> None:
    online = {repo: hub.download(repo) for repo in REPOS}
    hub.requests.clear()
    for repo, before in online.items():
        offline = hub.download(repo, HF_HUB_OFFLINE="1")
        unreachable = hub.download(repo, HF_ENDPOINT="http://127.0.0.1:9")
        for result in (offline, unreachable):
            assert (result["folder"], result["commit"], result["files"]) == (before["folder"], COMMIT, before["files"])
            assert "cache" in result["lines"][0]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo_id", "environment", "shown"),
    [
        ("org/nothing", {}, ["no such model", "hf auth login"]),
        ("org/gated", {}, ["gated", "Accept its terms"]),
        ("org/both@v9", {}, ["org/both@v9", "no such revision"]),
        ("org/both", {"HF_HUB_OFFLINE": "1"}, ["cannot be reached", "HF_HUB_OFFLINE"]),
        ("org/both", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached", "the network"]),
        ("org/both/x", {}, ["not a Hub id"]),
    ],
)
def test_errors_say_the_next_step(hub: Hub, repo_id: str, environment: dict[str, str], shown: list[str]) -> None:
    result = hub.download(repo_id, **environment)
    assert (result["error"], result["exit"]) == ("AccessError", 1)
    for text in [repo_id, *shown]:
        assert text in result["message"]


def test_without_the_client_the_extra_is_named() -> None:
    program = """
import sys
sys.modules["huggingface_hub"] = None
from deltafmt.errors import MissingExtraError
from deltafmt.hub import download
try:
    download("org/name")
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "huggingface_hub, which is not installed" in done.stdout and "deltafmt[hub]" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "gpt2",
        "org/name",
        "Qwen/Qwen2.5-0.5B",
        "org/name@main",
        "org/name@refs/pr/1",
        "a_b/c-d.e",
        "org/name@" + "0" * 40,
    ],
)
def test_repo_ids(text: str) -> None:
    assert looks_like_repo_id(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ".",
            "..",
            "/org/name",
            "./name",
            "~/name",
            "a/b/c",
            "org/name/",
            "org//name",
            "org\\name",
            "a b/c",
            "org/..",
        ),
        *(
            "model.safetensors",
            "folder/pytorch_model.bin",
            "-a/b",
            "a/b-",
            "a--b/c",
            "org/name.git",
            "org/name@",
            "@main",
        ),
        *("é/b", "org/" + "x" * 97, "https://hub/org/name", "C:\\models", "org/name\n"),
    ],
)
def test_what_is_no_repo_id(text: str) -> None:
    assert not looks_like_repo_id(text)


def test_split_repo_id() -> None:
    assert split_repo_id("org/name@v1") == ("org/name", "v1")
    assert split_repo_id("org/name") == ("org/name", None)
    assert split_repo_id("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
