"""How right an answer is: exact match, accuracy and Rouge-L, each in [0, 1]."""

import functools
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

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


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F (longest common subsequence of stemmed words), the best over the references."""
    return max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


@functools.cache
def _scorer() -> Any:
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    logging.get_absl_handler().python_handler.stream = sys.__stderr__  # it closes any other stream it was made on
    return RougeScorer(["rougeL"], use_stemmer=True)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "rouge_l": rouge_l,
}
