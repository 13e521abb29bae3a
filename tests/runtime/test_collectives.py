"""What ranks exchange in a training step: one reduction, of gradients, loss, and requests to save or stop."""

import contextlib
import itertools
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from clpet.cli.launch import check_gpus, start_ranks
from clpet.errors import HostError
from clpet.runtime import distributed
from clpet.runtime.distributed import DistributedWorld, LostRank, get_world, init_distributed, raise_on_lost_rank
from clpet.training.fit_checkpoint import FitCheckpointer

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch, unused_port: int):
    """A process group of one rank, whose collectives run as between several."""
    for name, value in {**ALONE, "MASTER_PORT": str(unused_port)}.items():
        monkeypatch.setenv(name, value)
    with init_distributed(torch.device("cpu"), 1) as world:
        yield world


@pytest.fixture
def unused_port() -> int:
    """A free port of this machine."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def test_a_training_step_has_one_collective(make, one_rank) -> None:
    """A fit of 12 steps with checkpoints has 12 reductions, and one for the decision to write at its end."""
    run = make("method=sequential", "train.global_batch_size=4")
    run.trainer.checkpointer = FitCheckpointer(run.method, minutes=60)
    run.trainer.begin_task(0)
    run.trainer.checkpointer.start_task(None, lambda number, record: None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.method.learn(run.benchmark.tasks[0], 0, run.trainer)
    counts = Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))
    assert run.method.objective.meter.cost.steps == 12
    assert counts["gloo:all_reduce"] == 12 + 1
    assert set(counts) == {"gloo:all_reduce", "gloo:all_gather"}
    assert counts["gloo:all_gather"] < 12  # of random states, once, at the end of the fit


def exchange(folder: str) -> None:
    """Rank 0 has gradients for a and b, rank 1 for b and c; rank 1 gets a signal."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        parameters = [nn.Parameter(torch.zeros(2)) for _ in "abcd"]
        for number in (0, 1) if ranks.index == 0 else (1, 2):
            parameters[number].grad = torch.full((2,), 10.0 * number + ranks.index + 1)
        checkpointer = FitCheckpointer()
        checkpointer.start_task(None, lambda number, record: None)
        mean = torch.tensor(1.0 + ranks.index)
        ranks.sum_gradients(parameters, mean, checkpointer.requests())
        before = checkpointer.should_save()
        checkpointer.shutdown.pending_signal = signal.SIGTERM if ranks.index else None
        ranks.sum_gradients(parameters[3:], mean.clone(), checkpointer.requests())
        after = checkpointer.should_save(), checkpointer.shutdown.pending_signal
        gradients = [None if value.grad is None else value.grad.tolist() for value in parameters]
        torch.save([gradients, mean.item(), before, after], Path(folder, f"{ranks.index}.pt"))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_ranks_sum_gradients_and_agree_on_signals(tmp_path: Path) -> None:
    start_ranks(2, exchange, str(tmp_path))
    gradients = [[1.0, 1.0], [11.0 + 12.0] * 2, [22.0, 22.0], None]
    for index in range(2):
        values = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert values == [gradients, 3.0, False, (True, signal.SIGTERM)]


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_wait_for_the_main_one_without_a_limit(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a main rank that fails lets the others go on; two waits of a run do not disturb each other."""
    monkeypatch.setattr(distributed, "POLL", 0.001)
    store, calls = HashStore(), []

    def rank(index: int) -> None:
        world = DistributedWorld.__new__(DistributedWorld)
        world.store, world.index, world.waits = store, index, itertools.count()
        for _ in range(2):
            with contextlib.suppress(KeyError), world.main_first():
                calls.append(index)
                if world.is_main:
                    time.sleep(0.05)
                    calls.append("ready")
                if fails:
                    raise KeyError
            with world.wait_for_main():
                if world.is_main:
                    time.sleep(0.05)

    threads = [threading.Thread(target=rank, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert calls == [0, "ready", 1] * 2


def test_only_ranks_that_cannot_be_reached_are_lost() -> None:
    """In the words of gloo, the store and NCCL; other errors keep their own."""
    for text in (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "Timed out waiting 7200000ms for recv operation to complete",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ):
        with pytest.raises(LostRank, match="another rank of this run has ended"), raise_on_lost_rank():
            raise RuntimeError(text)
    text = "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5000"
    with pytest.raises(RuntimeError, match=r"^ncclInvalidUsage"), raise_on_lost_rank():
        raise RuntimeError(text)


def test_ranks_that_share_a_gpu_are_refused() -> None:
    check_gpus([("a", "1"), ("a", "2"), ("b", "1")])
    with pytest.raises(HostError, match="2 of the 3 ranks would share a GPU of b: start one process for each GPU"):
        check_gpus([("a", "1"), ("b", "1"), ("b", "1")])


def test_a_single_process_decides_alone() -> None:
    parameter, mean = nn.Parameter(torch.zeros(1)), torch.tensor(2.0)
    get_world().sum_gradients([parameter], mean, [True])
    assert (parameter.grad, mean.item(), get_world().agreed([False])) == (None, 2.0, [False])
