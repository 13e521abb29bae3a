"""Scores of an answer in [0, 1], from exact match to SARI.

Each metric takes the answer, the references (the best match counts) and the source, the text that the answer is about.
"""

import functools
import re
import string
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from clpet.errors import need_package
from clpet.metrics.sari import sari

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOT_WORD = re.compile(r"[^\w\s]")
_CODE_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


class _RougeScore(Protocol):
    fmeasure: float


class _RougeScorer(Protocol):
    def score(self, target: str, prediction: str) -> dict[str, _RougeScore]: ...


class _BertScorer(Protocol):
    def score(self, cands: list[str], refs: list[list[str]]) -> Sequence[float]: ...


def plain(text: str) -> str:
    """Lower case, without ASCII punctuation, single spaces."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def caseless(text: str) -> str:
    """Lower case, without leading and trailing white space."""
    return text.strip().lower()


def words(text: str) -> list[str]:
    """The words of a text; characters that are neither word characters nor white space separate words."""
    return _NOT_WORD.sub(" ", text).split()


def exact_match(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 if the answer equals a reference up to case, punctuation and spaces."""
    return float(any(plain(answer) == plain(reference) for reference in references))


def chosen(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 if the answer, one of several labels, equals a reference exactly."""
    return float(answer in references)


def accuracy(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 if the answer equals a reference up to case and surrounding white space."""
    return float(any(caseless(answer) == caseless(reference) for reference in references))


def first_word(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 if the answer's first word is a reference in the same case (SLM's generative accuracy)."""
    first = words(answer)[:1]
    return float(bool(first) and any(first == words(reference) for reference in references))


def first_char(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 if the first character is that of a reference in the same case (TRACE's ScienceQA: "B\\nBecause ...")."""
    first = answer.strip()[:1]
    return float(bool(first) and any(first == reference.strip()[:1] for reference in references))


def edit_similarity(answer: str, references: Sequence[str], source: str = "") -> float:
    """1 - insertions and deletions / total length, of code with its literals filled in (TRACE's Py150); 0 if empty."""
    from rapidfuzz import fuzz

    if not answer:
        return 0.0
    return max(fuzz.ratio(_filled(answer), _filled(reference)) / 100 for reference in references)


def _filled(code: str) -> str:
    """Code in which <NUM_LIT> is 0, <STR_LIT> is empty and <STR_LIT:x> is x, likewise for the other literals."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _CODE_LITERAL.sub(r"\1", code)


def rouge_l(answer: str, references: Sequence[str], source: str = "") -> float:
    """Rouge-L F (longest common subsequence of stemmed words), the best over the references."""
    return max(float(_scorer().score(reference, answer)["rougeL"].fmeasure) for reference in references)


@functools.cache
def _scorer() -> _RougeScorer:
    from absl import logging
    from rouge_score.rouge_scorer import RougeScorer

    # absl closes the stream that its handler was created with, unless it is the process's own stderr.
    logging.get_absl_handler().python_handler.stream = sys.__stderr__
    scorer: _RougeScorer = RougeScorer(["rougeL"], use_stemmer=True)
    return scorer


def bert_score(answer: str, references: Sequence[str], source: str = "") -> float:
    """BERTScore F of roberta-large's 17th layer, without idf or rescaling; 0 for no answer."""
    if not answer.strip():
        return 0.0
    return float(_bert_scorer().score([answer], [list(references)])[2])


@functools.cache
def _bert_scorer() -> _BertScorer:
    from bert_score import BERTScorer

    scorer: _BertScorer = BERTScorer(model_type="roberta-large", num_layers=17, idf=False, rescale_with_baseline=False)
    return scorer


# metric -> (package, extra of clpet that installs it)
_LIBRARIES = {"rouge_l": ("rouge_score", "metrics"), "edit_similarity": ("rapidfuzz", "metrics"),
              "bert_score": ("bert_score", "bert-score")}  # fmt: skip


def need(metric: str) -> None:
    """Raises ConfigError for a metric whose library is not installed."""
    if metric in _LIBRARIES:
        need_package(*_LIBRARIES[metric], f"benchmark.metric={metric}")


METRICS: dict[str, Callable[[str, Sequence[str], str], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "first_word": first_word,
    "first_char": first_char,
    "edit_similarity": edit_similarity,
    "sari": sari,
    "bert_score": bert_score,
}
FREE = ("rouge_l", "first_char", "edit_similarity", "sari", "bert_score")  # metrics of texts that are not labels
# The form in which each metric of labels compares them.
_COMPARED: dict[str, Callable[[str], object]] = {"exact_match": plain, "accuracy": caseless, "first_word": words}


def mistaken(metric: str, labels: Sequence[str]) -> str:
    """Why a metric cannot score these labels (two are equal, or one can never be right); '' if it can."""
    seen: dict[str, str] = {}
    for label in labels:
        if not METRICS[metric](label, [label], ""):
            return f"the label {label!r} can never be right"
        other = seen.setdefault(str(_COMPARED[metric](label)), label)
        if other != label:
            return f"the labels {other!r} and {label!r} are equal"
    return ""


def that_tell_apart(labels: Sequence[str]) -> list[str]:
    """The metrics that distinguish all of these labels."""
    return [metric for metric in _COMPARED if not mistaken(metric, labels)]
