"""Bad luck with the real thing: a full disk, a second process, damaged weights, wandb slow, gone or killed."""

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
    (found,) = out.glob("*/*/s*/results.json")
    return json.loads(found.read_text())["scores"]


@pytest.fixture(scope="module")
def undisturbed(words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The scores of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_cli(*RUN, *tiny_args(words), f"output_dir={out}") == 0
    return scores(out)


def warnings(folder: Path) -> str:
    """The log of the only run in `folder`/out."""
    (log,) = folder.glob("out/*/*/s*/train.log")
    return log.read_text()


def until(condition: Any, seconds: float = 60) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def started(args: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    """`clpet ARGS` in a process of its own."""
    command = [sys.executable, "-m", "clpet", *args]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip


# The disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "clpet", place]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may make a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, room: int) -> Path:
    """A file that leaves `room` KiB of a disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 1024 * room))
    return ballast


@pytest.mark.parametrize(
    ("room", "tasks"), [(0, 0), (8, 0), (30, 0), (60, 0), (100, 1), (150, 1), (200, 3), (240, 3), (300, 3)]
)
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(
    room: int, tasks: int, disk: Path, undisturbed: dict, words: Path, clpet
) -> None:
    """At the start, in a checkpoint, among the adapters, the pictures, the results: finished tasks are there."""
    args = [*RUN, *tiny_args(words), f"output_dir={disk / 'out'}"]
    ballast = fill(disk, room)
    found = clpet(*args)
    *warnings, last = found.err.splitlines()
    assert found.code == 1
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


def test_a_cache_without_room_is_done_without(
    disk: Path, undisturbed: dict, words: Path, clpet, tmp_path: Path
) -> None:
    fill(disk, 0)
    found = clpet(*RUN, *tiny_args(words), f"cache_dir={disk}", "output_dir=out")
    assert found.code == 0
    assert "No space left on device" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed


# A second process, and files that were cut short


def test_the_second_process_in_a_run_directory_leaves_and_the_first_is_undisturbed(
    words: Path, clpet, tmp_path: Path
) -> None:
    args = [*RUN, *tiny_args(words, "train.epochs=3000"), "output_dir=out"]
    first = started(args, tmp_path)
    until(lambda: list(tmp_path.glob("out/*/*/s*/metrics.jsonl")))
    second = clpet(*args)
    assert second.code == 1
    assert second.err.count("\n") == 1
    assert "another process is working in" in second.err
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75
    assert list(tmp_path.glob("out/" + CHECKPOINT))


def test_a_checkpoint_that_was_cut_short_is_named_and_the_one_before_it_used(
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
    """As much of wandb's server as a run needs to start; after that, or from the beginning, it answers nothing."""

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
    """A server of wandb's; silent.set() ends its answers."""
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.daemon_threads, found.silent = True, threading.Event()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.socket.close()


def logged(out: Path, kind: str) -> dict:
    """What wandb's own file in a run directory holds."""
    (file,) = out.glob(f"*/*/s*/wandb/{kind}-*/run-*.wandb")
    return read_wandb(file)


def key_for(server: Any) -> dict[str, str]:
    """Environment variables of somebody who is logged in there."""
    return {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_MODE": "online",
    }


def test_a_server_that_never_answers_costs_the_time_out_and_no_figures(
    server: Any, undisturbed: dict, words: Path, tmp_path: Path
) -> None:
    server.silent.set()
    args = [*RUN, *tiny_args(words), "output_dir=out", "tracking=auto", "tracking.timeout=2"]
    process = started(args, tmp_path, **key_for(server))
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "wandb does not start online" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed
    assert "wandb does not start offline" not in warnings(tmp_path)
    assert logged(tmp_path / "out", "offline-run")["summary"]["average"] == pytest.approx(np.mean(undisturbed[-1]))


def test_a_server_that_falls_silent_after_the_start_costs_the_time_out_at_the_end(
    server: Any, undisturbed: dict, words: Path, tmp_path: Path
) -> None:
    args = [*RUN, *tiny_args(words), "output_dir=out", "tracking=auto", "tracking.finish_timeout=2"]
    process = started(args, tmp_path, **key_for(server))
    until(lambda: list(tmp_path.glob("out/*/*/s*/metrics.jsonl")))
    server.silent.set()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "wandb cannot" in warnings(tmp_path)
    assert "wandb sync" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed
    assert len(logged(tmp_path / "out", "run")["history"]) >= 4


def test_a_run_outlives_the_service_of_wandb(undisturbed: dict, words: Path, tmp_path: Path) -> None:
    """The process that wandb writes by is killed after the first evaluation."""
    args = [*RUN, *tiny_args(words), "output_dir=out", "tracking=offline"]
    process = started(args, tmp_path)
    until(lambda: list(tmp_path.glob("out/*/*/s*/metrics.jsonl")))
    subprocess.run(["pkill", "-KILL", "--parent", str(process.pid)], check=True)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "continuing without it" in warnings(tmp_path)
    assert scores(tmp_path / "out") == undisturbed
