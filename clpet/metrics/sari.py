"""SARI: how well a simplified text adds, keeps and deletes the words of its source (Xu et al., 2016)."""

import re
from collections import Counter
from collections.abc import Sequence

MAX_NGRAM = 4  # words
_REPLACED = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# mteval's 13a tokenisation puts spaces around symbols, and around . , - unless they stand between digits.
_SEPARATED = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def sari(answer: str, references: Sequence[str], source: str) -> float:
    """(F1 of additions + F1 of kept n-grams + precision of deletions) / 3, each the mean over n-grams of 1 to 4 words.

    Equal to the hub's metric `sari`, with which TRACE scores 20Minuten: lower case, 13a tokens, 0/0 = 1.
    """
    texts = [words(source), words(answer), *map(words, references)]
    parts = []
    for size in range(1, MAX_NGRAM + 1):
        source_grams, answer_grams, *reference_grams = (_ngrams(text, size) for text in texts)
        parts += _operations(source_grams, answer_grams, reference_grams)
    return sum(parts) / len(parts)


def words(text: str) -> list[str]:
    """Lower-case tokens of mteval's 13a tokenisation."""
    text = f" {text.lower()} "
    for symbol, replacement in _REPLACED.items():
        text = text.replace(symbol, replacement)
    for pattern, separated in _SEPARATED:
        text = pattern.sub(separated, text)
    return text.split()


def _ngrams(tokens: list[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def _operations(
    old: Counter[tuple[str, ...]], new: Counter[tuple[str, ...]], references: list[Counter[tuple[str, ...]]]
) -> list[float]:
    """[F1 of added, F1 of kept, precision of deleted n-grams].

    Kept and deleted n-grams are counted once per reference; additions count by kind.
    """
    times = len(references)
    target: Counter[tuple[str, ...]] = sum(references, Counter())
    old, new = (Counter({gram: times * count for gram, count in grams.items()}) for grams in (old, new))
    added, missing = set(new) - set(old), set(target) - set(old)
    adding = _f1(_ratio(len(added & set(target)), len(added)), _ratio(len(added & set(target)), len(missing)))
    common = old & new
    correct = common & target
    keeping = _f1(_mean_share(correct, common), _ratio(correct.total(), (old & target).total()))
    deleted = old - new
    return [adding, keeping, _mean_share(deleted - target, deleted)]


def _mean_share(subset: Counter[tuple[str, ...]], grams: Counter[tuple[str, ...]]) -> float:
    """Mean over the distinct n-grams of the share of their count that is in `subset`."""
    return _ratio(sum(subset[gram] / grams[gram] for gram in subset), len(grams))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
