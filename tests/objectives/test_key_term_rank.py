"""Key terms of domains, the places where they are asked for, and ranks."""

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


def test_terms_set_a_domain_apart() -> None:
    """Water is in all three. heron: tf 4, df 1: (1 + ln 4) ln 3; river: tf 2, df 2: (1 + ln 2) ln 1.5."""
    found = key_terms(TEXTS, 3)
    assert found["birds"] == ["heron", "river heron", "river"]
    assert found["boats"] == ["tall", "boat", "river boat"]  # tall 3 times; boat, river boat, ship, tall ship twice
    assert found["metals"] == ["copper", "copper wire", "molten"]
    assert all("water" not in terms for terms in key_terms(TEXTS, 99).values())
    assert "iron" not in key_terms(TEXTS, 99)["metals"]  # once


def test_a_term_stands_in_the_text_as_it_is() -> None:
    """No n-gram over a stop word, a full stop or a line's end."""
    text = "State of the art neural  nets. Deep neural\nnets, deep neural nets"
    found = list(ngrams(text, 3))
    terms = [term for term, _, _ in found]
    assert terms == ["state", "art", "art neural", "neural", "nets", "deep", "deep neural", "neural", "nets",
                     "deep", "deep neural", "neural", "deep neural nets", "neural nets", "nets"]  # fmt: skip
    assert all(text[start:end].lower() == term for term, start, end in found)


def test_places_are_fixed_and_terms_take_turns() -> None:
    text = "we saw that " + "and then the heron " * 9 + "near the old boat"
    found = prompts({"b": [text]}, {"b": ["heron", "boat"]}, per_domain=4, seed=1, min_characters=5)
    assert sorted(prompt.term for prompt in found) == ["boat", "heron", "heron", "heron"]
    assert {prompt.term for prompt in found[:2]} == {"boat", "heron"}
    assert all(text.startswith(prompt.context + prompt.target) for prompt in found)
    assert prompts({"b": [text]}, {"b": ["heron", "boat"]}, per_domain=4, seed=1, min_characters=5) == found
    assert prompts({"b": [text]}, {"b": ["heron", "boat"]}, per_domain=4, seed=2, min_characters=5) != found


def test_the_longest_term_of_a_place_is_asked_for_with_its_context() -> None:
    text = "all along the muddy banks the Night heron waits; (heron) heron"
    found = prompts({"b": [text]}, {"b": ["heron", "night heron", "banks"]}, characters=16, min_characters=25)
    assert {(prompt.context, prompt.target) for prompt in found} == {
        ("muddy banks the", " Night heron"),
        ("waits; (heron)", " heron"),
    }


def test_ranks_are_optimistic() -> None:
    """Equal logits do not count: 4, 1, 3, 1, 5, and not 4, 2, 3, 2, 5."""
    logits = torch.tensor([2.0, 5, 3, 5, 1])
    assert ranks(logits.expand(5, 5), torch.arange(5)).tolist() == [4, 1, 3, 1, 5]


def test_figures_of_ranks() -> None:
    found = rank_statistics([1, 4, 16, 2], ["a", "a", "a", "b"])
    assert found["a"] == {"median": 4, "mean_log": pytest.approx(math.log(4))}
    assert found["b"]["mean_log"] == pytest.approx(math.log(2))
    assert found["all"]["median"] == 3
