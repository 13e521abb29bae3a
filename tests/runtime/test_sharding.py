"""Weights divided among ranks (hardware.shard=true): the same run as in one process, with a part of the memory."""

import contextlib
import hashlib
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

from clpet.cli.launch import start_ranks
from clpet.errors import HostError
from clpet.evaluation.evaluator import Evaluator
from clpet.models.backbone import byte_tokenizer
from clpet.runtime.distributed import full_tensor, get_world, init_distributed, is_sharded
from clpet.runtime.run_checkpoint import read_tree, write_tree
from clpet.runtime.sharding.files import read_shards, write_shards
from clpet.runtime.sharding.gradients import total_norm
from clpet.runtime.sharding.tensors import aligned, from_rows, local, own_rows, pack, row_counts, smallest, sums, unpack
from clpet.runtime.tensor_memory import TensorsAlive
from clpet.training.fit_checkpoint import FitCheckpointer
from tests.conftest import domain_args, set_up, tiny_args
from tests.runtime.test_multi_process import Losses

pytestmark = pytest.mark.usefixtures("forked_ranks")
MODELS = {
    "llama": ["model=tiny_llama"],
    "bert": ["model=tiny"],
    "t5": ["model=tiny_t5", "objective=text_to_text", "benchmark.max_target=8"],
}
METHODS = {
    "sequential": ["method=sequential", "train.clip=0.5"],
    "replay": ["method=replay", "replay=share"],
    "ewc": ["method=ewc"],
    "kif": ["method=kif", "method.unit=matrix"],
    "lwf": ["method=lwf"],
    "joint": ["method=joint"],
}
CASES = {f"{method} {model}": [*METHODS[method], *MODELS[model]] for method in METHODS for model in MODELS}
# A full step of AdamW on a gradient of rounding alone would differ, and dropout differs between ranks.
FULL = ["peft=none", "cache_dir=null", "train.epochs=2", "train.global_batch_size=5", "train.lr=1e-3",
        "train.eps=1e-3", "model.dropout=off"]  # fmt: skip


class Traced:
    """The first gradient and every loss of a run over two tasks, and how many scalars this rank holds.

    With `parts` one process computes the first gradient in the passes of that many ranks, whose sums round equally.
    """

    def __init__(self, overrides: list[str], parts: int = 0) -> None:
        run = set_up(overrides)
        if parts:
            world = get_world()
            world.micro_batches = lambda rows, size: [(rows[i::parts], True) for i in range(parts)]
        run.trainer.progress = losses = Losses()
        self.gradient: torch.Tensor | None = None  # of the first step, as one vector
        run.method.adjust_gradients = self.norms(run.method.adjust_gradients, run.method)
        for index, task in run.method.curriculum()[:2]:
            run.trainer.begin_task(index)
            run.method.learn(task, index, run.trainer)
            run.method.after_task(task, index)
        weights = list(run.method.objective.adapters.model.parameters())
        self.share = sum(local(w.detach()).numel() for w in weights) / sum(w.numel() for w in weights)
        self.losses = losses.values
        scores = Evaluator(run.benchmark, run.data)(run.method, 2, [0, 1]).seen
        self.scores = [score.value for score in scores.values()]

    def norms(self, adjust: Any, method: Any) -> Any:
        def noting(context: Any) -> None:
            adjust(context)
            if self.gradient is None:
                gradients = [full_tensor(value.grad) for value in method.parameters() if value.grad is not None]
                self.gradient = torch.cat([gradient.flatten() for gradient in gradients])
                vars(get_world()).pop("micro_batches", None)

        return noting


def trace(folder: str, cases: dict[str, list[str]], options: list[str]) -> None:
    """Runs the cases on one of several ranks and writes what `Traced` has found."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        found = {}
        for name, overrides in cases.items():
            ranks.sharded, ranks.mesh = False, None
            found[name] = vars(Traced([*overrides, *options]))
        torch.save(found, Path(folder, f"{ranks.index}.pt"))


def on_ranks(count: int, folder: Path, cases: dict[str, list[str]], *options: str) -> list[dict[str, Any]]:
    """What every rank has found of the cases."""
    start_ranks(count, trace, str(folder), cases, ["hardware.shard=true", *options])
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(count)]


def assert_equal(found: dict[str, Any], overrides: list[str], parts: int = 2) -> None:
    """The run on ranks is that of one process: losses to 1e-5, the gradient to 1e-7 of its norm, the same scores."""
    one = Traced(overrides, parts)
    assert len(one.losses) >= 20
    assert found["losses"] == pytest.approx(one.losses, rel=0, abs=1e-5)
    assert one.gradient is not None
    assert (found["gradient"] - one.gradient).norm() <= 1e-7 * one.gradient.norm()
    assert found["scores"] == one.scores


def on_files(words: Path, prose: Path, folder: Path) -> dict[str, list[str]]:
    """Cases whose weights every rank reads shard by shard, also of a frozen network and of one that reads plain text."""
    cases = {}
    for name, architecture in (("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, vocab_size=266, hidden_size=32, num_hidden_layers=2,
                                                   num_attention_heads=2, intermediate_size=64)  # fmt: skip
        getattr(transformers, architecture)(config).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        model = ["model=local", f"model.path={folder / name}", "method=sequential"]
        adapter = ["peft=lora", "peft.targets=all-linear"]
        cases[f"{name} from files"] = [*tiny_args(words), *FULL, *model]
        cases[f"{name} frozen"] = [*tiny_args(words), *FULL, *model, *adapter]
        plain = [*domain_args(prose, "benchmark.max_train=20", "evaluation.max_tokens=500"), *FULL[1:], *model]
        cases[f"{name} plain text"] = [*plain, "train.epochs=2", "peft=none"]
    uneven = [*adapter, "train.global_batch_size=3", "hardware.micro_batch_size=1"]  # a rank repeats a row
    for method in (["method=ilora", "replay=reservoir"], ["method=migu"]):
        cases[f"{method[0]} frozen"] = [*tiny_args(words), *FULL, *model, *uneven, *method]
    cases["blocks"] = [*tiny_args(words), *FULL, "model=tiny_llama", "peft=blocks", "peft.every=1", "method=ewc"]
    return cases


@pytest.mark.slow
def test_weights_from_files_frozen_ones_blocks_and_plain_text(words: Path, prose: Path, tmp_path: Path) -> None:
    cases = on_files(words, prose, tmp_path)
    (tmp_path / "ranks").mkdir()
    first, second = on_ranks(2, tmp_path / "ranks", cases)
    for name, overrides in cases.items():
        assert first[name]["losses"] == second[name]["losses"]
        assert first[name]["share"] <= (0.85 if "frozen" in name else 0.51), name
        one = Traced(overrides)
        assert first[name]["losses"] == pytest.approx(one.losses, rel=0, abs=1e-5), name
        assert first[name]["scores"] == pytest.approx(one.scores, rel=1e-5), name


@pytest.fixture(scope="module")
def by_rank(forked_ranks: None, words: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case on two ranks, one after the other in the same two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    return on_ranks(2, folder, {name: [*tiny_args(words), *FULL, *args] for name, args in CASES.items()})


@pytest.mark.slow
@pytest.mark.xdist_group("sharded")  # one worker: the two ranks run all cases once
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_with_half_of_the_weights_learn_as_one_process(name: str, words: Path, by_rank: list) -> None:
    first, second = (found[name] for found in by_rank)
    assert first["losses"] == second["losses"]
    assert max(first["share"], second["share"]) <= 0.51
    assert_equal(first, [*tiny_args(words), *FULL, *CASES[name]])


@pytest.mark.slow
def test_two_replicas_of_two_shards_learn_as_one_process(words: Path, tmp_path: Path) -> None:
    args = [*tiny_args(words), *FULL, "method=ewc", "model=tiny", "train.global_batch_size=6"]
    args.append("hardware.micro_batch_size=1")
    ranks = on_ranks(4, tmp_path, {"hsdp": args}, "hardware.replicas=2")
    assert all(found["hsdp"]["losses"] == ranks[0]["hsdp"]["losses"] for found in ranks)
    assert max(found["hsdp"]["share"] for found in ranks) <= 0.51
    one = Traced(args)
    assert ranks[0]["hsdp"]["losses"] == pytest.approx(one.losses, rel=0, abs=1e-5)


class Stopped(Exception):
    """Simulates the end of a process."""


def part(folder: Path, overrides: list[str], steps: int) -> None:
    """Starts or resumes a run of two tasks from the files in a folder, and stops after some steps of the second."""
    run = set_up(overrides)
    record = None
    if (folder / "before").is_dir():
        before = read_tree(folder / "before")
        run.method.load_state_dict(before["method"])
        run.trainer.load(before["trainer"])
        record = read_tree(sorted(folder.glob("0*"))[-1])
    else:
        run.learn(0)
        write_tree(folder / "before", {"method": run.method.state_dict(), "trainer": run.trainer.state()})
    written = []

    def write(number: int, task: Any) -> None:
        write_tree(folder / f"{number:03d}", task)
        written.append(number)
        if len(written) == steps:
            raise Stopped

    run.trainer.checkpointer = FitCheckpointer(run.method, 1e-9)
    run.trainer.begin_task(1)
    run.trainer.checkpointer.start_task(record, write)
    with contextlib.suppress(Stopped):
        run.method.learn(run.benchmark.tasks[1], 1, run.trainer)
        run.method.after_task(run.benchmark.tasks[1], 1)
        run.method.save(folder / "done")


def parts(folders: dict[str, list[str]], steps: int) -> None:
    """`part` of several runs, one after the other, on a rank."""
    with init_distributed(torch.device("cpu"), 1) as ranks:
        for folder, overrides in folders.items():
            ranks.sharded, ranks.mesh = False, None
            part(Path(folder), [*overrides, "hardware.shard=true"], steps)


@pytest.mark.slow
def test_a_run_resumes_on_one_rank_and_again_on_two(words: Path, tmp_path: Path) -> None:
    """The state of the task, optimiser and method is divided over the new number of ranks; the trained model is that of one process."""
    args = [*tiny_args(words), *FULL, "model=tiny_llama", "train.optimizer_state=carry"]
    methods = {"kif": METHODS["kif"], "ewc": METHODS["ewc"], "recurrent": ["method=recurrent_kif", "replay=share",
               "method.inner_steps=2", "method.outer_steps=1"]}  # fmt: skip
    runs = {str(tmp_path / name): [*args, *method] for name, method in methods.items()}
    for folder in runs:
        Path(folder).mkdir()
    start_ranks(2, parts, runs, 3)
    for folder, overrides in runs.items():
        part(Path(folder), overrides, 3)
    assert not list(tmp_path.glob("*/done"))
    start_ranks(2, parts, runs, -1)
    for folder, overrides in runs.items():
        one = set_up(overrides)
        one.learn(0)
        one.learn(1)
        weights = dict(one.method.objective.adapters.model.named_parameters())
        saved = load_file(Path(folder, "done", "model", "model.safetensors"))
        assert saved.keys() == weights.keys()
        assert all(torch.allclose(saved[name], value, rtol=0, atol=1e-5) for name, value in weights.items()), folder


def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of one rank in this process."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": free_port()}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return init_distributed(torch.device("cpu"), 1)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_sharded_tensors_are_stored_with_checksums_and_read_on_any_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files of two ranks, and one of this process; a file that is damaged is noticed."""
    values = torch.arange(15.0).view(5, 3)
    with one_rank(monkeypatch) as ranks:
        ranks.mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        tensor = from_rows(values, 5)
        assert local(tensor).tolist() == values.tolist()
        assert aligned(values * 2, tensor).full_tensor().tolist() == (values * 2).tolist()
        write_tree(tmp_path / "one", {"a": [tensor, 1], "b": values})
        again = read_tree(tmp_path / "one")
        assert is_sharded(again["a"][0])
        assert again["a"][0].full_tensor().tolist() == values.tolist()
    whole = read_tree(tmp_path / "one")
    assert (whole["a"][0].tolist(), whole["a"][1], whole["b"].tolist()) == (values.tolist(), 1, values.tolist())
    (shard,) = (tmp_path / "one").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        read_tree(tmp_path / "one")


def test_rows_are_divided_as_by_chunk_and_joined_from_any_number_of_files(tmp_path: Path) -> None:
    values = torch.arange(10.0).view(5, 2)
    checksums = {}
    for number, rows in enumerate(values.chunk(2)):
        path = tmp_path / f"shard-{number:05d}.safetensors"
        save_file({"/a": rows.contiguous()}, path)
        checksums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_shards(tmp_path, checksums)["/a"].tolist() == values.tolist()
    mesh = SimpleNamespace(ndim=1, size=lambda dim: 4, get_local_rank=lambda dim: 2)
    assert row_counts(5, mesh) == [2, 2, 1, 0] == [*map(len, values.chunk(4)), 0]
    assert own_rows(5, mesh) == (4, 5)


@pytest.mark.parametrize("name", ["/dev/zero", "../shard-00000.safetensors", "shard-0.safetensors", "x"])
def test_only_names_of_shards_are_read(name: str, tmp_path: Path) -> None:
    """A checkpoint of somebody else cannot make a run read other files."""
    with pytest.raises(ValueError, match="is not the name of a shard"):
        read_shards(tmp_path / "state", {name: "0"})


def test_shards_are_regular_files_with_rows_of_one_shape(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="checksum"):
        read_shards(tmp_path, {"shard-00000.safetensors": "0"})
    (tmp_path / "shard-00000.safetensors").unlink()
    checksums = {}
    for number in range(2):
        path = tmp_path / f"shard-{number:05d}.safetensors"
        save_file({"/a": torch.zeros(2, 2 + number)}, path)
        checksums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="differ in shape"):
        read_shards(tmp_path, checksums)


def test_a_shard_that_cannot_be_written_is_an_error_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with one_rank(monkeypatch) as ranks:
        ranks.mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        with pytest.raises(HostError, match="cannot be written"):
            write_shards(tmp_path / "missing", {"a": from_rows(torch.zeros(2, 2), 2)})


def test_the_memory_of_a_sharded_tensor_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four rows with three scalars, before and after an operation: 24 bytes each, with gradients or without."""
    with one_rank(monkeypatch) as ranks:
        ranks.mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        weight = torch.nn.Parameter(from_rows(torch.zeros(2, 3), 4))
        with TensorsAlive() as alive:
            alive.add([weight])
            assert alive.bytes == 24
            total = weight + weight.detach()
            assert alive.bytes == 48
        del total


def test_only_the_main_rank_writes_a_sharded_network(make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others leave no folder, where the main rank has a temporary one until it is complete."""
    method = make("method=sequential", "peft=none").method
    monkeypatch.setattr(get_world(), "mesh", SimpleNamespace(), raising=False)
    monkeypatch.setattr(get_world(), "index", 1, raising=False)
    method.save(tmp_path / "after-001")
    assert not (tmp_path / "after-001").exists()
    monkeypatch.setattr(get_world(), "index", 0)
    method.save(tmp_path / "after-001")
    assert (tmp_path / "after-001" / "model" / "model.safetensors").is_file()


def test_without_sharding_functions_return_what_they_get() -> None:
    theta, x = torch.ones(3), torch.tensor(2.0)
    assert sums([(theta, x)]) == [x]
    assert pack(theta, [theta]) is theta is unpack(theta, [theta])
    assert aligned(theta, x) is theta
    assert smallest(torch.tensor([3.0, 1.0, 2.0]), 2, [theta]).item() == 2
    assert total_norm([theta, theta]).item() == pytest.approx(6**0.5)
