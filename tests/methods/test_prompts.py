"""L2P and Progressive Prompts: which prompts are prepended, in which order, and how texts are cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clpet.methods import l2p
from clpet.methods.base import AnswerSpace
from clpet.training.step import StepContext
from tests.conftest import double, scores, tiny_args


def test_l2p_chooses_by_cosine() -> None:
    keys = double([[1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0, 0], [1, 1, 1]])
    cosines, chosen = l2p.nearest(double([[1, 0, 0]]), keys, 3)
    assert chosen.tolist() == [[0, 1, 4]]
    assert cosines[0].tolist() == pytest.approx([1, 0.70710678, 0.57735027], abs=1e-8)
    assert -0.5 * cosines.sum(1).mean().item() == pytest.approx(-1.1422285252, abs=1e-9)


def test_l2p_loss_and_input(make) -> None:
    """Keys start as the mean of their prompt; top_k length vectors are prepended by falling similarity."""
    run = make("method=l2p")
    method, batch = run.method, run.data.train.batch(run.data.train.rows_of(0)[:4])
    method.grow_head(0)
    assert torch.allclose(method.keys, method.prompts.mean(1))
    cosines, chosen = method.nearest(batch)
    embeds = method.objective.inputs(batch)["inputs_embeds"]
    assert embeds.shape[1] == 15 + batch.input_ids.shape[1]
    assert torch.equal(embeds[0, 5:10], method.prompts[chosen[0, 1]])
    plain = super(l2p.L2P, method).loss(StepContext.of(batch))
    assert (method.loss(StepContext.of(batch)) - plain).item() == pytest.approx(
        -0.5 * cosines.sum(1).mean().item(), abs=1e-5
    )


def test_progressive_prompts_grow_and_stay(make) -> None:
    """Every task adds ten vectors, newest first; the older ones stay unchanged bit for bit."""
    run = make("method=progressive_prompts", "train.lr=1e-2")
    method, batch = run.method, run.data.train.batch(np.arange(4))
    width = batch.input_ids.shape[1]
    frozen: list[torch.Tensor] = []
    for index in range(3):
        run.learn(index)
        frozen.append(method.new.detach().clone())
        embeds = method.objective.inputs(batch)["inputs_embeds"]
        assert embeds.shape[1] == 10 * (index + 1) + width
        assert torch.equal(embeds[0, :-width], torch.cat(frozen[::-1]))


def test_text_is_cut_and_prompts_are_not(make) -> None:
    """A model with 40 positions leaves 10 tokens for the text next to three prompts; special tokens stay."""
    run = make("method=progressive_prompts", "model.config.max_position_embeddings=40")
    pool, tokenizer = run.data.train, run.method.objective.tokenizer
    assert pool.lengths.max() == 10
    cut = [pool.tokens(row) for row in range(len(pool)) if pool.lengths[row] == 10]
    assert all((row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for row in cut)
    for index in range(3):
        run.learn(index)
    embeds = run.method.objective.inputs(pool.batch(np.arange(len(pool))))["inputs_embeds"]
    assert embeds.shape[1] == 40
    assert scores(run, np.arange(24)).isfinite().all()


@pytest.mark.parametrize("representation", ["cls", "last", "mean", "mask"])
def test_a_prompt_of_token_embeddings_reads_like_the_text_with_those_tokens(representation: str, make) -> None:
    """The position that is read shifts with the prompt, and padding is not read."""
    template = ["benchmark.template='{text} {mask}'"] if representation == "mask" else []
    run = make("method=progressive_prompts", f"model.representation={representation}", *template)
    objective, pool = run.method.objective, run.data.train
    batch = pool.batch(np.flatnonzero(pool.lengths != pool.lengths.max())[:5])
    ids = torch.tensor([50, 60, 70])
    embedding = objective.adapters.model.get_input_embeddings()
    objective.prompt = lambda batch: embedding(ids).expand(len(batch), -1, -1)
    with torch.no_grad():
        features = objective.features(batch)
        longer = torch.cat([ids.expand(len(batch), 3), batch.input_ids], dim=1)
        mask = torch.cat([torch.ones(len(batch), 3, dtype=torch.long), batch.attention_mask], dim=1)
        hidden = objective.adapters.model(input_ids=longer, attention_mask=mask).last_hidden_state
    rows = torch.arange(len(batch))
    length = batch.attention_mask.sum(1)
    expected = {
        "cls": hidden[:, 3],
        "last": hidden[rows, 2 + length],
        "mask": hidden[rows, 3 + batch.positions],
        "mean": torch.stack([hidden[row, 3 : 3 + length[row]].mean(0) for row in rows]),
    }[representation]
    assert torch.allclose(features, expected, atol=1e-5)


def test_a_given_task_uses_only_the_prompts_up_to_it(make) -> None:
    """The input of task 1 is bit for bit the one right after it was learned."""
    run = make("method=progressive_prompts", "method.task_id_at_test=true", "train.lr=1e-2")
    method, pool = run.method, run.data.test
    run.learn(0)
    batch = pool.batch(pool.rows_of(0))
    seen = []
    with torch.inference_mode():
        before = method.objective.features(batch)
    run.learn(1)
    run.learn(2)
    with torch.inference_mode():
        method.objective.head.scatter = lambda h: seen.append(h) or h
        everything = pool.batch(np.arange(len(pool)))
        method.predict(everything, AnswerSpace(range(12), everything.tasks))
    assert len(seen) == 3
    assert torch.allclose(seen[0], before, atol=1e-6)


def test_the_reparametrisation_is_part_of_what_is_stored(make) -> None:
    run = make("method=progressive_prompts", "method.mlp=16")
    run.learn(0)
    shown = run.method.newest().detach()
    assert not torch.allclose(shown, run.method.new)
    run.learn(1)
    assert torch.equal(run.method.frozen[0], shown)
    twin = make("method=progressive_prompts", "method.mlp=16")
    twin.method.load_state_dict(run.method.state_dict())
    assert torch.equal(twin.method.prompt(run.data.test.batch([0])), run.method.prompt(run.data.test.batch([0])))
    assert torch.equal(scores(twin, np.arange(24)), scores(run, np.arange(24)))


@pytest.mark.parametrize("method", ["mocl", "progressive_prompts"])
def test_a_run_with_the_task_given_says_so(method: str, words: Path, clpet, tmp_path: Path) -> None:
    args = ["train", f"method={method}", "method.task_id_at_test=true", *tiny_args(words), "train.epochs=1"]
    assert clpet(*args).code == 0
    (path,) = tmp_path.glob("outputs/*/*/s*/results.json")
    assert json.loads(path.read_text())["task_id_at_test"] is True
