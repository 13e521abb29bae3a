"""How right answers are, beside what tests/test_text_to_text.py says."""

import sys
from types import SimpleNamespace

import pytest
import torch

from clpet import metrics
from clpet.errors import ConfigError


def test_the_first_word_decides_in_its_own_case() -> None:
    """SLM's generative accuracy."""
    assert metrics.first_word("A.", ["A"]) == 1
    assert metrics.first_word("  B) because", ["A", "B"]) == 1
    assert metrics.first_word("Positive", ["positive"]) == 0
    assert metrics.first_word("neutral or negative", ["negative"]) == 0
    assert metrics.first_word("", [""]) == 0
    assert metrics.first_word("...", ["A"]) == 0


def test_bert_score_is_its_library_s_f(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scorer for all answers; an empty one is 0 and asks nothing."""
    made = []

    class BERTScorer:
        def __init__(self, **settings: object) -> None:
            made.append(settings)

        def score(self, answers: list[str], references: list[list[str]]) -> tuple[torch.Tensor, ...]:
            assert references == [["see a doctor", "rest"]]
            return torch.tensor([0.1]), torch.tensor([0.2]), torch.tensor([0.85])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=BERTScorer))
    metrics._bert_scorer.cache_clear()
    references = ["see a doctor", "rest"]
    assert [metrics.bert_score(answer, references) for answer in ("go home", " ", "rest")] == pytest.approx(
        [0.85, 0, 0.85]
    )
    assert made == [{"model_type": "roberta-large", "num_layers": 17, "idf": False, "rescale_with_baseline": False}]
    metrics._bert_scorer.cache_clear()


def test_a_metric_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.need("rouge_l")
    with pytest.raises(ConfigError, match="pip install bert-score"):
        metrics.need("bert_score")
