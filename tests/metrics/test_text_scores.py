"""Metrics of answers: first word, ROUGE-L, exact match, edit similarity, SARI and BERTScore."""

import sys
from types import SimpleNamespace

import pytest
import torch

from clpet.errors import ConfigError
from clpet.metrics import text_scores
from clpet.metrics.sari import sari, words

FIRST_WORD_CASES = [("A", "A.", 1), ("A", "(A) foo", 1), ("positive", "Positive", 0), ("A", "", 0), ("A", "Answer: A", 0),
      ("A", "A_B", 0), ("A", "A–B", 1), ("A", "“A”", 1), ("B", "B…", 1)]  # fmt: skip


@pytest.mark.parametrize(("label", "answer", "score"), FIRST_WORD_CASES)
def test_first_word_agrees_with_the_reference_code(label: str, answer: str, score: int) -> None:
    """Scores of SLM's score.py, also with punctuation around the label."""
    assert text_scores.first_word(answer, [label]) == text_scores.first_word(answer, [f"«{label}».", "other"]) == score


ROUGE_CASES = [
    ("The cats were sitting on mats", "A cat sat on the mat.", 0.5, 0),
    ("Charlie asks for help", "Charlie asks guys present at the party for help in cleaning", 8 / 15, 0),
    ("", "x", 0, 0),
    ("science or technology.", "Science or Technology", 1, 1),
    ("don't know", "dont know", 0.4, 1),
    ("-5", "5", 1, 1),
    ("!", "?", 0, 1),
]


@pytest.mark.parametrize(("answer", "reference", "rouge", "match"), ROUGE_CASES)
def test_rouge_l_and_exact_match_agree_with_the_reference_code(
    answer: str, reference: str, rouge: float, match: int
) -> None:
    """Scores of compute_metrics.py in SAPT and O-LoRA."""
    assert text_scores.rouge_l(answer, [reference]) == pytest.approx(rouge)
    assert text_scores.exact_match(answer, [reference]) == match


def test_first_char_ignores_the_explanation() -> None:
    """As in TRACE's eval_ScienceQA.py."""
    gold = ["B\nPhotosynthesis is what plants use."]
    assert text_scores.first_char("B\nBecause plants make food from light.", gold) == 1
    assert text_scores.first_char("A\nPhotosynthesis is what plants use.", gold) == 0
    assert text_scores.first_char("", ["", " "]) == 0


def test_edit_similarity_counts_insertions_and_deletions() -> None:
    """fuzz.ratio: 2 * 3 common characters / (4 + 5); placeholders are replaced as in TRACE's eval_Py150.py."""
    assert text_scores.edit_similarity("abcd", ["xbcdx"]) == pytest.approx(6 / 9)
    assert text_scores.edit_similarity("f(<NUM_LIT>, <STR_LIT:a>)", ["f(0, a)", "g"]) == 1
    assert text_scores.edit_similarity("<STR_LIT>x<NUM_LIT:7><CHAR_LIT>", ["x7"]) == 1
    assert text_scores.edit_similarity("", [""]) == 0


def test_sari_by_hand() -> None:
    """Source a b, answer a c, reference a d.

    Unigrams: c is added instead of d: 0; a is kept correctly: 1; b is deleted correctly: 1. Bigrams: a c is added
    instead of a d: 0; none is kept, as in the reference: 1; a b is deleted correctly: 1. Longer n-grams: 0/0 = 1.
    """
    assert sari("a c", ["a d"], "a b") == pytest.approx(((0 + 1 + 1) + (0 + 1 + 1) + 3 + 3) / 12)
    assert sari("A cat, sat.", ["a cat , sat ."], "The dog") == 1


def test_sari_equals_the_hub_metrics_documented_example() -> None:
    """The example in the documentation of `sari` on the hub: 26.953601953601954."""
    references = ["About 95 species are currently known .", "About 95 species are now accepted .",
                  "95 species are now accepted ."]  # fmt: skip
    score = sari("About 95 you now get in .", references, "About 95 species are currently accepted .")
    assert 100 * score == pytest.approx(26.953601953601954, rel=1e-12)


def test_sari_tokenizes_like_mteval() -> None:
    assert words('He "said" 1,000.5-ish,&amp; x-y.') == [
        "he",
        '"',
        "said",
        '"',
        "1,000.5",
        "-",
        "ish",
        ",",
        "&",
        "x-y",
        ".",
    ]


def test_first_word_is_case_sensitive() -> None:
    """The generative accuracy of SLM."""
    assert text_scores.first_word("A.", ["A"]) == 1
    assert text_scores.first_word("  B) because", ["A", "B"]) == 1
    assert text_scores.first_word("Positive", ["positive"]) == 0
    assert text_scores.first_word("neutral or negative", ["negative"]) == 0
    assert text_scores.first_word("", [""]) == 0
    assert text_scores.first_word("...", ["A"]) == 0


def test_bert_score_is_the_f_score_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scorer serves all answers; an empty answer scores 0 without calling it."""
    scorer_settings = []

    class BERTScorer:
        def __init__(self, **settings: object) -> None:
            scorer_settings.append(settings)

        def score(self, answers: list[str], references: list[list[str]]) -> tuple[torch.Tensor, ...]:
            assert references == [["see a doctor", "rest"]]
            return torch.tensor([0.1]), torch.tensor([0.2]), torch.tensor([0.85])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=BERTScorer))
    text_scores._bert_scorer.cache_clear()
    references = ["see a doctor", "rest"]
    assert [text_scores.bert_score(answer, references) for answer in ("go home", " ", "rest")] == pytest.approx(
        [0.85, 0, 0.85]
    )
    assert scorer_settings == [
        {"model_type": "roberta-large", "num_layers": 17, "idf": False, "rescale_with_baseline": False}
    ]
    text_scores._bert_scorer.cache_clear()


def test_a_metric_without_its_library_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text_scores.need("exact_match")
    for metric, extra in (("bert_score", "bert-score"), ("rouge_l", "metrics"), ("edit_similarity", "metrics")):
        with pytest.raises(ConfigError, match=rf"metric={metric} needs .*: pip install 'clpet\[{extra}\]'"):
            text_scores.need(metric)
