"""SARI: how well a simplified text adds, keeps and deletes the words of its source (Xu et al., 2016)."""

import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words of an n-gram
_READ_AS = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# Where the 13a tokenisation of mteval puts spaces: around signs, and around . , - unless between digits.
_SPACED = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def sari(answer: str, references: Sequence[str], source: str) -> float:
    """(F1 of additions + F1 of what is kept + precision of deletions) / 3, each the mean over n-grams of 1 to 4 words.

    As in the hub's metric `sari`, which TRACE scores 20Minuten with: lower case, 13a tokens, 0/0 = 1.
    """
    texts = [words(source), words(answer), *map(words, references)]
    parts = []
    for size in range(1, LONGEST + 1):
        old, new, *wanted = (_ngrams(text, size) for text in texts)
        parts += _operations(old, new, wanted)
    return sum(parts) / len(parts)


def words(text: str) -> list[str]:
    """Lower-case tokens of mteval's 13a tokenisation."""
    text = f" {text.lower()} "
    for sign, read in _READ_AS.items():
        text = text.replace(sign, read)
    for pattern, spaced in _SPACED:
        text = pattern.sub(spaced, text)
    return text.split()


def _ngrams(tokens: list[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def _operations(
    old: Counter[tuple[str, ...]], new: Counter[tuple[str, ...]], wanted: list[Counter[tuple[str, ...]]]
) -> list[float]:
    """[F1 of additions, F1 of what is kept, precision of deletions] of n-grams.

    Kept and deleted n-grams are counted once per reference; additions count by kind.
    """
    times = len(wanted)
    target: Counter[tuple[str, ...]] = sum(wanted, Counter())
    old, new = (Counter({gram: times * count for gram, count in grams.items()}) for grams in (old, new))
    added, missing = set(new) - set(old), set(target) - set(old)
    adding = _f1(_ratio(len(added & set(target)), len(added)), _ratio(len(added & set(target)), len(missing)))
    kept = old & new
    good = kept & target
    keeping = _f1(_mean_share(good, kept), _ratio(good.total(), (old & target).total()))
    deleted = old - new
    return [adding, keeping, _mean_share(deleted - target, deleted)]


def _mean_share(part: Counter[tuple[str, ...]], whole: Counter[tuple[str, ...]]) -> float:
    """Mean over the kinds in `whole` of their share in `part`."""
    return _ratio(sum(part[gram] / whole[gram] for gram in part), len(whole))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
