"""Key terms of domains, the prompts that end before them, and their ranks."""

import math

import pytest
import torch

from clpet.objectives.key_term_rank import key_terms, ngrams, prompts, rank_statistics, ranks

TEXTS = {
    "birds": [
        "The river heron waits. A grey heron flies over the water.",
        "Night heron and river heron share the water",
    ],
    "boats": ["The river boat sails over the water, a tall ship too.", "A tall ship and a tall mast and a river boat"],
    "metals": ["Copper wire in water; copper wire in air", "molten iron, molten copper"],
}


def test_key_terms_distinguish_a_domain() -> None:
    """Water is in all three. heron: tf 4, df 1: (1 + ln 4) ln 3; river: tf 2, df 2: (1 + ln 2) ln 1.5."""
    terms = key_terms(TEXTS, 3)
    assert terms["birds"] == ["heron", "river heron", "river"]
    assert terms["boats"] == ["tall", "boat", "river boat"]  # tall 3 times; boat, river boat, ship, tall ship twice
    assert terms["metals"] == ["copper", "copper wire", "molten"]
    assert all("water" not in selected for selected in key_terms(TEXTS, 99).values())
    assert "iron" not in key_terms(TEXTS, 99)["metals"]  # occurs once


def test_ngrams_are_literal_spans_of_the_text() -> None:
    """N-grams do not cross stop words, full stops or line ends."""
    text = "State of the art neural  nets. Deep neural\nnets, deep neural nets"
    matches = list(ngrams(text, 3))
    terms = [term for term, _, _ in matches]
    assert terms == ["state", "art", "art neural", "neural", "nets", "deep", "deep neural", "neural", "nets",
                     "deep", "deep neural", "neural", "deep neural nets", "neural nets", "nets"]  # fmt: skip
    assert all(text[start:end].lower() == term for term, start, end in matches)


def test_prompts_depend_on_the_seed_only_and_terms_take_turns() -> None:
    text = "we saw that " + "and then the heron " * 9 + "near the old boat"
    selected = prompts({"b": [text]}, {"b": ["heron", "boat"]}, per_domain=4, seed=1, min_characters=5)
    assert sorted(prompt.term for prompt in selected) == ["boat", "heron", "heron", "heron"]
    assert {prompt.term for prompt in selected[:2]} == {"boat", "heron"}
    assert all(text.startswith(prompt.context + prompt.target) for prompt in selected)
    assert prompts({"b": [text]}, {"b": ["heron", "boat"]}, per_domain=4, seed=1, min_characters=5) == selected
    assert prompts({"b": [text]}, {"b": ["heron", "boat"]}, per_domain=4, seed=2, min_characters=5) != selected


def test_prompts_ask_for_the_longest_term_at_a_position() -> None:
    text = "all along the muddy banks the Night heron waits; (heron) heron"
    selected = prompts({"b": [text]}, {"b": ["heron", "night heron", "banks"]}, characters=16, min_characters=25)
    assert {(prompt.context, prompt.target) for prompt in selected} == {
        ("muddy banks the", " Night heron"),
        ("waits; (heron)", " heron"),
    }


def test_ties_do_not_raise_a_rank() -> None:
    """Only larger logits count: 4, 1, 3, 1, 5, and not 4, 2, 3, 2, 5."""
    logits = torch.tensor([2.0, 5, 3, 5, 1])
    assert ranks(logits.expand(5, 5), torch.arange(5)).tolist() == [4, 1, 3, 1, 5]


def test_rank_statistics_per_domain_and_overall() -> None:
    statistics = rank_statistics([1, 4, 16, 2], ["a", "a", "a", "b"])
    assert statistics["a"] == {"median": 4, "mean_log": pytest.approx(math.log(4))}
    assert statistics["b"]["mean_log"] == pytest.approx(math.log(2))
    assert statistics["all"]["median"] == 3
