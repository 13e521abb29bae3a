"""`clpet export --hub`: the commit that a server gets, and what is refused before anything is loaded."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs.conftest import refused


class Hub(http.server.BaseHTTPRequestHandler):
    """The four calls of the hub's API that an upload makes."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.calls.append((self.path, self.headers["Authorization"], body))  # type: ignore[attr-defined]
        if self.server.broken:  # type: ignore[attr-defined]
            self.send_error(403)
            return
        address = f"http://127.0.0.1:{self.server.server_port}/ann/words"  # type: ignore[attr-defined]
        answers: dict[str, Any] = {
            "/api/repos/create": {"url": address, "id": "ann/words"},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/ann/words/commit/main": {
                "commitUrl": f"{address}/commit/1",
                "commitOid": "1",
                "success": True,
            },
        }
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answers[self.path] = {"files": files}
        self.answer(answers[self.path])

    def do_GET(self) -> None:
        self.answer({"id": "ann/words", "sha": "0", "siblings": []})

    def answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Any]:
    """A local stand-in for the hub, which records the calls."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.broken = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.socket.close()


def export(run: Path, hub: Any, *words: str) -> subprocess.CompletedProcess:
    """`clpet export RUN out --merge --hub ann/words`, logged in at the local server."""
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_0",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "clpet", "export", str(run), "out", "--merge", "--hub", "ann/words", *words]
    return subprocess.run(
        command, cwd=run.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_an_upload_is_one_commit_of_the_folder(run: Path, hub: Any) -> None:
    answer = export(run, hub)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == f"uploaded to http://127.0.0.1:{hub.server_port}/ann/words"
    calls = {path: body for path, _, body in hub.calls}
    assert {token for _, token, _ in hub.calls} == {"Bearer hf_0"}
    created = json.loads(calls["/api/repos/create"])
    assert (created["name"], created["organization"], created["visibility"]) == ("words", "ann", "private")
    header, *entries = [json.loads(line) for line in calls["/api/models/ann/words/commit/main"].splitlines()]
    assert header["key"] == "header"
    files = {entry["value"]["path"]: base64.b64decode(entry["value"]["content"]) for entry in entries}
    folder = run.parent / "out"
    assert files == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert {"README.md", "model.safetensors", "heads/default.safetensors"} <= set(files)


@pytest.mark.slow
def test_a_failed_upload_keeps_the_folder_and_says_how_to_go_on(run: Path, hub: Any) -> None:
    hub.broken = True
    answer = export(run, hub, "--public")
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert "clpet: out is written but not uploaded (" in answer.stderr
    assert "`hf upload ann/words out`" in answer.stderr
    assert json.loads(hub.calls[0][2])["visibility"] == "public"
    assert (run.parent / "out" / "README.md").is_file()


def test_an_upload_is_refused_before_anything_is_loaded(clpet, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0")
    for words, reason in (
        (["--hub", "words"], "give the repository as USER/NAME"),
        (["--hub", "ann/a b"], "--hub ann/a b: "),
        (["--public"], "--public needs --hub USER/NAME"),
    ):
        answer = clpet("export", run, "out", "--merge", *words)
        assert refused(answer), answer.err
        assert reason in answer.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("clpet.runs.hub_upload.get_token", lambda: None)
    answer = clpet("export", run, "out", "--merge", "--hub", "ann/words")
    assert refused(answer)
    assert "run `hf auth login`, or set HF_TOKEN" in answer.err
    assert not Path("out").exists()
