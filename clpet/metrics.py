"""How right an answer is: exact match, accuracy, first word, Rouge-L and BERTScore, each in [0, 1]."""

import functools
import importlib.util
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

from clpet.errors import ConfigError

_SPACES = str.maketrans(dict.fromkeys(string.punctuation, " "))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Lower case, without punctuation (unless there is nothing else), single spaces."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split()) or text.strip()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference up to case, punctuation and spaces."""
    return float(any(plain(answer) == plain(reference) for reference in references))


def accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference up to case and outer spaces."""
    return float(any(answer.strip().lower() == reference.strip().lower() for reference in references))


def first_word(answer: str, references: Sequence[str]) -> float:
    """1 if the first word, punctuation read as spaces, is a reference in the same case (SLM's generative accuracy)."""
    return float(answer.translate(_SPACES).split()[:1] in [[reference] for reference in references])


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F (longest common subsequence of stemmed words), the best over the references."""
    return max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


@functools.cache
def _scorer() -> Any:
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    logging.get_absl_handler().python_handler.stream = sys.__stderr__  # it closes any other stream it was made on
    return RougeScorer(["rougeL"], use_stemmer=True)


def bert_score(answer: str, references: Sequence[str]) -> float:
    """BERTScore F of roberta-large's 17th layer, without idf or rescaling; 0 for no answer."""
    if not answer.strip():
        return 0.0
    return float(_bert_scorer().score([answer], [list(references)])[2])


@functools.cache
def _bert_scorer() -> Any:
    from bert_score import BERTScorer

    return BERTScorer(model_type="roberta-large", num_layers=17, idf=False, rescale_with_baseline=False)


def need(metric: str) -> None:
    """Raises ConfigError for a metric whose library is not installed."""
    if metric == "bert_score" and importlib.util.find_spec("bert_score") is None:
        raise ConfigError("benchmark.metric=bert_score needs its library: `pip install bert-score`, or take rouge_l")


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "first_word": first_word,
    "bert_score": bert_score,
}
