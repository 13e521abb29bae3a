"""Runs under bad conditions: a full disk, a second process, damaged weights, wandb slow, unreachable or killed."""

import gzip
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import run_cli, tiny_args
from tests.wandb_reader import read_wandb

pytestmark = pytest.mark.slow
RUN = ["train", "method=dynamic_conpet"]
CHECKPOINT = "*/*/s*/state/[0-9]*/state.json"


def scores(out: Path) -> dict:
    """The transfer matrix of the only run in a folder."""
    (file,) = out.glob("*/*/s*/results.json")
    return json.loads(file.read_text())["scores"]


@pytest.fixture(scope="module")
def undisturbed(words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The scores of a run without disturbance."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_cli(*RUN, *tiny_args(words), f"output_dir={out}") == 0
    return scores(out)


def warnings(folder: Path) -> str:
    """The log of the only run in `folder`/out."""
    (log,) = folder.glob("out/*/*/s*/train.log")
    return log.read_text()


def wait_for(condition: Any, seconds: float = 60) -> None:
    """Waits until a condition holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def started(args: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    """Starts `clpet ARGS` in a separate process."""
    command = [sys.executable, "-m", "clpet", *args]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip


# The disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "clpet", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, room: int) -> Path:
    """Writes a file that leaves `room` KiB free on a disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 1024 * room))
    return ballast


@pytest.mark.parametrize(
    ("room", "tasks"), [(0, 0), (8, 0), (30, 0), (60, 0), (100, 1), (150, 1), (200, 2), (240, 3), (300, 3)]
)
@pytest.mark.usefixtures("rendered")
def test_a_full_disk_ends_a_run_with_one_line_and_loses_nothing(
    room: int, tasks: int, disk: Path, undisturbed: dict, words: Path, clpet
) -> None:
    """At the start, in a checkpoint, or writing adapters, figures or results: all finished tasks are saved."""
    args = [*RUN, *tiny_args(words), f"output_dir={disk / 'out'}"]
    ballast = fill(disk, room)
    answer = clpet(*args)
    *warnings, last = answer.err.splitlines()
    assert answer.code == 1
    assert last.startswith("clpet: ")
    assert "disk is full" in last or "No space left on device" in last
    assert not [line for line in warnings if "Traceback" in line or "internal error" in line]
    saved = [int(path.parent.name[:3]) for path in (disk / "out").glob(CHECKPOINT)]
    assert max(saved, default=0) >= tasks
    ballast.unlink()
    again = clpet(*args)
    assert again.code == 0
    assert again.out.count(" · epoch 2/2") == 1 + 2 * (len(undisturbed) - 2) - (2 * max(saved) - 1 if saved else 0)
    assert scores(disk / "out") == undisturbed


def test_a_run_works_without_space_for_its_cache(
    disk: Path, undisturbed: dict, words: Path, clpet, tmp_path: Path
) -> None:
    fill(disk, 0)
    assert clpet(*RUN, *tiny_args(words), f"cache_dir={disk}", "output_dir=out").code == 0
    assert "No space left on device" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed


# A second process, and truncated files


def test_a_second_process_in_a_run_directory_ends_and_the_first_continues(words: Path, clpet, tmp_path: Path) -> None:
    args = [*RUN, *tiny_args(words, "train.epochs=3000"), "output_dir=out"]
    first = started(args, tmp_path)
    wait_for(lambda: list(tmp_path.glob("out/*/*/s*/metrics.jsonl")))
    second = clpet(*args)
    assert second.code == 1
    assert second.err.count("\n") == 1
    assert "another process is working in" in second.err
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75
    assert list(tmp_path.glob("out/" + CHECKPOINT))


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(
    undisturbed: dict, words: Path, clpet, tmp_path: Path
) -> None:
    args = [*RUN, *tiny_args(words), "output_dir=out"]
    assert clpet(*args).code == 0
    (run,) = tmp_path.glob("out/*/*/s*")
    (run / "results.json").unlink()
    newest = run / "state" / "003" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = clpet(*args)
    assert again.code == 0
    assert "state/003 is damaged" in again.err + (run / "train.log").read_text()
    assert "task 3/3" in again.out
    assert "task 2/3" not in again.out
    assert scores(tmp_path / "out") == undisturbed


# wandb


class Server(http.server.BaseHTTPRequestHandler):
    """The part of wandb's server that a run needs to start. Once `silent` is set it no longer answers."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.silent.is_set():  # type: ignore[attr-defined]
            threading.Event().wait()
        project = {"id": "1", "name": "project", "entity": {"id": "1", "name": "entity"}}
        bucket = {
            "id": "1",
            "name": "run",
            "displayName": "run",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if b"UpsertBucket" in body else {}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Any]:
    """A local stand-in for wandb's server; `silent.set()` makes it stop answering."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.silent = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.socket.close()


def logged(out: Path, kind: str) -> dict:
    """The contents of wandb's file in a run directory."""
    (file,) = out.glob(f"*/*/s*/wandb/{kind}-*/run-*.wandb")
    return read_wandb(file)


def key_for(server: Any) -> dict[str, str]:
    """Environment variables of a user who is logged in to that server."""
    return {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_MODE": "online",
    }


def test_a_server_that_never_answers_costs_only_the_timeout(
    server: Any, undisturbed: dict, words: Path, tmp_path: Path
) -> None:
    server.silent.set()
    args = [*RUN, *tiny_args(words), "output_dir=out", "tracking=auto", "tracking.timeout=2"]
    process = started(args, tmp_path, **key_for(server))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert "wandb does not start online" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed
    assert "wandb does not start offline" not in warnings(tmp_path)
    assert logged(tmp_path / "out", "offline-run")["summary"]["average"] == pytest.approx(np.mean(undisturbed[-1]))


def test_a_server_that_stops_answering_costs_only_the_final_timeout(
    server: Any, undisturbed: dict, words: Path, tmp_path: Path
) -> None:
    args = [*RUN, *tiny_args(words), "output_dir=out", "tracking=auto", "tracking.finish_timeout=2"]
    process = started(args, tmp_path, **key_for(server))
    wait_for(lambda: list(tmp_path.glob("out/*/*/s*/metrics.jsonl")))
    server.silent.set()
    errors = process.communicate(timeout=40)[1]  # the rest of the run, 2 seconds, and 5 for wandb's process to end
    assert process.returncode == 0, errors
    assert "wandb cannot" in warnings(tmp_path)
    assert "wandb sync" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed
    assert len(logged(tmp_path / "out", "run")["history"]) >= 4


def test_a_run_survives_the_death_of_wandb_s_service(undisturbed: dict, words: Path, tmp_path: Path) -> None:
    """wandb's background process is killed after the first evaluation."""
    args = [*RUN, *tiny_args(words), "output_dir=out", "tracking=offline"]
    process = started(args, tmp_path)
    wait_for(lambda: list(tmp_path.glob("out/*/*/s*/metrics.jsonl")))
    subprocess.run(["pkill", "-KILL", "--parent", str(process.pid)], check=True)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "continuing without it" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed
