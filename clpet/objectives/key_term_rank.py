"""Prediction rank of a domain's key terms (Yıldız et al., 2024, arXiv 2402.17400).

Key terms are the n-grams of words that distinguish a domain from the others. At a fixed list of positions in test text,
every checkpoint gets the context before a key term; the metric is the rank of the term's first token among all tokens.
A rank of 1 is best.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import Tensor

from clpet.config.seeding import derive
from clpet.data.benchmark import Benchmark, Example
from clpet.data.packing import Windows
from clpet.data.template import first_tokens
from clpet.data.token_cache import Stream
from clpet.models.protocols import Tokenizer

MAX_DOCUMENTS = 5000  # of a split, for key terms and prompts
_WORD = re.compile(r"[^\W\d_]{3,}")  # three or more letters


@dataclass(frozen=True)
class Prompt:
    """A position in a test text: `context` ends before the space in front of a key term, `target` starts with it."""

    domain: str
    term: str
    context: str
    target: str


def key_terms(texts: Mapping[str, Iterable[str]], count: int = 50, longest: int = 3) -> dict[str, list[str]]:
    """Up to `count` n-grams of each domain with the highest (1 + ln tf) ln(domains / df), lower case, best first.

    tf is the number of occurrences in the domain, at least 2; df is the number of domains with the term, fewer than
    all. Ties are sorted alphabetically.
    """
    counts = {
        name: Counter(term for text in documents for term, _, _ in ngrams(text, longest))
        for name, documents in texts.items()
    }
    df = Counter(term for frequencies in counts.values() for term in frequencies)
    terms = {}
    for name, frequencies in counts.items():
        weights = {
            term: (1 + math.log(tf)) * math.log(len(counts) / df[term])
            for term, tf in frequencies.items()
            if tf > 1 and df[term] < len(counts)
        }
        terms[name] = sorted(weights, key=lambda term: (-weights[term], term))[:count]
    return terms


def ngrams(text: str, longest: int) -> Iterator[tuple[str, int, int]]:
    """(term, start, end) of all runs of 1 to `longest` words, separated by single spaces, without stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    run: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        if match.group().lower() in ENGLISH_STOP_WORDS:
            run = []
            continue
        if run and text[run[-1][1] : match.start()] != " ":
            run = []
        run = [*run, match.span()][-longest:]
        for start, _ in run:
            yield text[start : match.end()].lower(), start, match.end()


def prompts(
    texts: Mapping[str, Iterable[str]],
    terms: Mapping[str, Sequence[str]],
    per_domain: int = 100,
    seed: int = 0,
    characters: int = 500,
    min_characters: int = 20,
) -> list[Prompt]:
    """At most `per_domain` positions of key terms in the test texts of their domain.

    Terms take turns, so that a frequent one does not fill the list; of overlapping terms the longest is used. A context
    has at most `characters` characters, cut between words, and at least `min_characters`.
    """
    chosen = []
    for name in sorted(texts):
        limits = (characters, min_characters)
        candidates = [prompt for text in texts[name] for prompt in _prompts(name, text, set(terms[name]), *limits)]
        # A random order; the stable sort by turn then takes the first prompt of every term before the second of any.
        order = np.random.default_rng(derive(seed, "prompts", name)).permutation(len(candidates))
        turns: Counter[str] = Counter()
        drawn: list[tuple[int, int, Prompt]] = []
        for index in order:
            drawn.append((turns[candidates[index].term], len(drawn), candidates[index]))
            turns[candidates[index].term] += 1
        chosen += [prompt for _, _, prompt in sorted(drawn, key=lambda entry: entry[:2])[:per_domain]]
    return chosen


def _prompts(domain: str, text: str, terms: set[str], characters: int, min_characters: int) -> Iterator[Prompt]:
    """All possible prompts of a text, without overlaps."""
    longest = max((len(term.split()) for term in terms), default=1)
    spans = [(start, -end, term) for term, start, end in ngrams(text, longest) if term in terms]
    free = 0  # end of the last prompt: later ones must not overlap it
    for start, negative_end, term in sorted(spans):  # at one start the longest term comes first
        if start < max(free, min_characters) or text[start - 1] != " ":
            continue
        free = -negative_end
        cut = max(0, start - characters)
        context = text[cut:start].rstrip()
        if cut and not text[cut - 1].isspace():
            context = context.partition(" ")[2]
        yield Prompt(domain, term, context, text[start - 1 : free])


def prompt_windows(
    benchmark: Benchmark, tokenizer: Tokenizer, per_domain: int, pad_id: int, split: str = "test"
) -> Windows:
    """A window per prompt: the end of its context and the first token of its term, the only token to predict."""
    tasks = {task.name: task for task in benchmark.tasks}
    terms = key_terms({name: _texts(task.train) for name, task in tasks.items()})
    selected = prompts({name: _texts(task.split(split)) for name, task in tasks.items()}, terms, per_domain)
    pool, head = Windows(pad_id), first_tokens(tokenizer, benchmark.add_bos)
    for index, name in enumerate(benchmark.names):
        rows = [_ids(tokenizer, prompt) for prompt in selected if prompt.domain == name]
        rows = [[*head, *ids[-(benchmark.max_length - len(head)) :]] for ids in rows]
        lengths = np.array([len(ids) for ids in rows], np.int64)
        flat = np.array([token for ids in rows for token in ids], np.int64)
        stream = Stream(flat, np.empty(0, np.int64), np.empty(0, np.float32))
        pool.add(index, stream, (np.cumsum(lengths) - lengths, lengths, lengths - 1))
    return pool


def _texts(documents: Iterable[Example]) -> Iterator[str]:
    return (example.text for example in islice(documents, MAX_DOCUMENTS))


def _ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Tokens of a context and of its term, up to the first token that is not only a space."""
    before = tokenizer(prompt.context, add_special_tokens=False)["input_ids"]
    full = tokenizer(prompt.context + prompt.target, add_special_tokens=False)["input_ids"]
    end = len(before) + 1
    while end < len(full) and not tokenizer.decode(full[len(before) : end]).strip():
        end += 1
    return full[:end]


def ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """[...]: 1 + the number of logits [..., vocabulary] above the target's; equal ones do not count."""
    of_target = logits.gather(-1, targets[..., None])
    return 1 + (logits > of_target).sum(-1)


def rank_statistics(values: Sequence[int], domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median rank and mean natural log of the rank, by domain and over `all` prompts; lower is better."""
    array, names = np.asarray(values, dtype=float), np.asarray(domains)
    groups = {"all": array, **{name: array[names == name] for name in dict.fromkeys(domains)}}
    return {
        name: {"median": float(np.median(group)), "mean_log": float(np.log(group).mean())}
        for name, group in groups.items()
    }
