"""Every option of peft on every kind of model: what can be done with it, measured. Used by the tests and for the table."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch

from clpet.cli.options import options
from clpet.errors import ClpetError
from clpet.objectives.base import AnswerSpace
from clpet.runtime.run_checkpoint import read_tree, write_tree
from tests.conftest import domain_args, set_up, tiny_args

KINDS = ("encoder", "decoder", "encoder-decoder")
STEPS = ("train", "resume", "export", "merged")
# Sizes that fit the layers of the tiny models, which have 32 inputs and 32 outputs.
SMALL = {
    "adamss": ["peft.r=8", "peft.num_subspaces=2"],
    "c3a": ["peft.block_size=8"],
    "fourierft": ["peft.n_frequency=20"],
    "gralora": ["peft.r=4"],
    "lily": ["peft.r=4"],
    "miss": ["peft.r=4"],
    "oft": ["peft.oft_block_size=8"],
    "p_tuning": ["peft.num_virtual_tokens=4"],
    "peanut": ["peft.r=4"],
    "prefix": ["peft.tokens=4"],
    "prompt": ["peft.tokens=4"],
    "psoft": ["peft.r=4"],
    "pvera": ["peft.r=4"],
    "randlora": ["peft.r=4"],
    "road": ["peft.group_size=8"],
    "shira": ["peft.r=4"],
    "trainable_tokens": ["peft.token_indices=[74,78,82,87,88,91]"],  # letters
    "vblora": ["peft.vector_length=8"],
    "vera": ["peft.r=4"],
    "waveft": ["peft.n_frequency=20"],
}
NAMES = sorted(set(options("peft")) - {"none", "frozen", "blocks"})


def arguments(kind: str, words: Path, prose: Path) -> list[str]:
    """Overrides of a run on this kind of model: labels, plain text, and answers in words."""
    if kind == "decoder":
        return [*domain_args(prose, "cache_dir=null"), "benchmark.max_train=12"]
    if kind == "encoder":
        return [*tiny_args(words), "cache_dir=null", "train.epochs=1"]
    texts = [word for word in tiny_args(words) if word != "model=tiny"]
    return [
        *texts,
        "cache_dir=null",
        "train.epochs=1",
        "model=tiny_t5",
        "objective=text_to_text",
        "benchmark.max_target=4",
    ]


def output(model: Any, kind: str) -> torch.Tensor:
    """The network's output for two texts of different length."""
    ids = torch.arange(18).view(2, 9) + 74  # letters, as the byte tokenizer numbers them
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()}
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.inference_mode():
        result = model(**inputs, **({} if kind == "encoder" else {"use_cache": False}))
    return result.last_hidden_state if kind == "encoder" else result.logits


def fresh_backbone(run: SimpleNamespace) -> Any:
    """The backbone as it was before the adapter was attached."""
    parts = run.session.components
    generates = parts.objective.traits.needs_output_layer
    return parts.backbone.load(torch.float32, torch.device("cpu"), run.config.seed, generates)[0]


def measure(name: str, kind: str, words: Path, prose: Path) -> dict[str, str]:
    """{step of STEPS: "yes", or why not}; a refusal gives {"train": its message}."""
    shared = [*arguments(kind, words, prose), "method=sequential", "train.lr=1e-2", "train.weight_decay=0"]
    args = [*shared, f"peft={name}", *SMALL.get(name, [])]
    try:
        return dict(_measure(args, kind))
    except ClpetError as error:
        return {"train": str(error)}


def _measure(args: list[str], kind: str) -> Iterator[tuple[str, str]]:
    run, resumed = set_up(args), set_up(args)
    adapters = run.method.objective.adapters
    start = {key: value.detach().clone() for key, value in adapters.tensors("default").items()}
    run.learn(0)
    trained = adapters.tensors("default")
    assert trained
    assert all(value.dtype is torch.float32 and value.isfinite().all() for value in trained.values())
    moved = [key for key in trained if not torch.equal(trained[key], start[key])]
    batch, labels = run.data.test.batch(run.data.test.rows_of(0)[:2]), run.benchmark.task_labels(0)
    with torch.inference_mode():
        run.method.predict(batch, AnswerSpace(labels))
    yield "train", "yes" if moved else "no tensor has changed"
    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder) / "state", {"method": run.method.state_dict()})
        resumed.method.load_state_dict(read_tree(Path(folder) / "state")["method"])
        run.learn(1)
        resumed.learn(1)
        again = resumed.method.objective.adapters.tensors("default")
        equal = again.keys() == trained.keys() and all(torch.equal(again[key], trained[key]) for key in trained)
        yield "resume", "yes" if equal else "the resumed run differs"
        expected = output(adapters.model, kind)
        run.method.save(Path(folder) / "adapters")
        backbone = fresh_backbone(run)
        if adapters.traits.keeps_backbone:
            with adapters.off():
                assert torch.equal(output(adapters.model, kind), output(backbone, kind))
        loaded = peft.PeftModel.from_pretrained(backbone, Path(folder) / "adapters" / "default").eval()
        close = torch.allclose(output(loaded, kind), expected, atol=1e-5)
        yield "export", "yes" if close else "the exported adapter differs"
    if not run.session.components.peft.traits.mergeable:
        yield "merged", "no"
        return
    try:
        close = torch.allclose(output(run.method.merged(), kind), expected, atol=1e-4)
    except ClpetError as error:
        yield "merged", str(error)
    else:
        yield "merged", "yes" if close else "the merged model differs"
