"""On a CUDA device, nothing in the training loop waits for it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clpet.models.protocols import network_of
from clpet.training.trainer import Trainer
from tests.conftest import domain_args, tiny_args
from tests.end_to_end.test_gpu import on
from tests.methods.test_all_methods import WORDS_OUT
from tests.objectives.test_preference import words as preference_words
from tests.objectives.test_preference import write_pairs


@contextlib.contextmanager
def no_waiting(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """In this block a step raises an error where the host waits for the device, except inside the network.

    The network is code of transformers, which reads masks. Yields the numbers of the steps.
    """
    steps: list[int] = []
    step = Trainer._step

    def strict(self: Trainer, *arguments: object) -> None:
        steps.append(len(steps))
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 2 else "default")  # buffers are made in the first
        try:
            step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def leave(module: nn.Module, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 2 else "default")

    network = network_of(run.method.objective.adapters.model)
    handles = [
        network.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
        network.register_forward_hook(leave),
    ]
    monkeypatch.setattr(Trainer, "_step", strict)
    try:
        yield steps
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()


def learn_without_waiting(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learns two tasks, the second without waiting for the device."""
    run.learn(0)
    with no_waiting(run, monkeypatch) as steps:
        run.learn(1)
    assert len(steps) > 6


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["sequential", "replay", "ewc", "kif", "o_lora", "er_ace", "dynamic_conpet"])
def test_a_step_on_labels_never_waits_for_the_device(method: str, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = on("cuda", [*tiny_args(words), f"method={method}", "train.global_batch_size=4", "train.clip=1"])
    learn_without_waiting(run, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["peft=lora"], ["peft=none"], ["peft=lora", "method=kif"]])
def test_a_step_on_plain_text_never_waits_for_the_device(
    more: list[str], prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = on("cuda", [*domain_args(prose), "method=sequential", *more, "train.global_batch_size=4", "train.epochs=2"])
    learn_without_waiting(run, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["model=tiny_llama"], ["model=tiny_t5"], ["model=tiny_llama", "method=kif"]])
def test_a_step_on_answers_never_waits_for_the_device(
    more: list[str], words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*tiny_args(words), *WORDS_OUT, "method=sequential", *more, "train.global_batch_size=4"]
    run = on("cuda", args)
    learn_without_waiting(run, monkeypatch)


@pytest.mark.gpu
def test_a_step_on_preferences_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pairs(tmp_path / "pairs")
    run = on("cuda", preference_words(folder, "method=sequential", "train.global_batch_size=8", "train.epochs=2"))
    learn_without_waiting(run, monkeypatch)
