"""Prediction rank of a domain's key terms (Yıldız et al., 2024, arXiv 2402.17400): is a term foreseen in its place?

Key terms are the n-grams of words that set a domain apart from the others. A fixed list of places in test text
where they stand is asked of every checkpoint: the context before the term, and the rank of the term's first token
among all tokens. A rank of 1 is best.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from clpet.config.seeding import derive
from clpet.data.benchmark import Benchmark, Example
from clpet.data.packing import Windows
from clpet.data.template import first_tokens
from clpet.data.token_cache import Stream

SAMPLE = 5000  # documents of a split that key terms and prompts come from
_WORD = re.compile(r"[^\W\d_]{3,}")  # letters, three or more


@dataclass(frozen=True)
class Prompt:
    """A place in a test text: `context` ends before the space in front of a key term, `target` starts with it."""

    domain: str
    term: str
    context: str
    target: str


def key_terms(texts: Mapping[str, Iterable[str]], count: int = 50, longest: int = 3) -> dict[str, list[str]]:
    """Up to `count` n-grams of each domain with the highest (1 + ln tf) ln(domains / df), lower case, best first.

    tf counts a term in the domain, at least twice; df the domains that have it, not all of them. Ties go by the
    alphabet.
    """
    counts = {
        name: Counter(term for text in own for term, _, _ in ngrams(text, longest)) for name, own in texts.items()
    }
    df = Counter(term for own in counts.values() for term in own)
    found = {}
    for name, own in counts.items():
        weights = {
            term: (1 + math.log(tf)) * math.log(len(counts) / df[term])
            for term, tf in own.items()
            if tf > 1 and df[term] < len(counts)
        }
        found[name] = sorted(weights, key=lambda term: (-weights[term], term))[:count]
    return found


def ngrams(text: str, longest: int) -> Iterator[tuple[str, int, int]]:
    """(term, start, end) of all runs of 1 to `longest` words with one blank between and no stop word among them."""
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
    least: int = 20,
) -> list[Prompt]:
    """Places in test texts where a key term of their domain stands after a blank, `per_domain` at most.

    Terms take turns, so that a frequent one does not fill the list; of terms that overlap at a place the longest is
    asked for. A context has up to `characters` characters, cut between words, and at least `least`.
    """
    found = []
    for name in sorted(texts):
        places = [prompt for text in texts[name] for prompt in _places(name, text, set(terms[name]), characters, least)]
        order = np.random.default_rng(derive(seed, "prompts", name)).permutation(len(places))
        turns: Counter[str] = Counter()
        drawn: list[tuple[int, int, Prompt]] = []
        for place in order:
            drawn.append((turns[places[place].term], len(drawn), places[place]))
            turns[places[place].term] += 1
        found += [prompt for _, _, prompt in sorted(drawn, key=lambda entry: entry[:2])[:per_domain]]
    return found


def _places(domain: str, text: str, terms: set[str], characters: int, least: int) -> Iterator[Prompt]:
    longest = max((len(term.split()) for term in terms), default=1)
    spans = [(start, -end, term) for term, start, end in ngrams(text, longest) if term in terms]
    free = 0
    for start, negative_end, term in sorted(spans):
        if start < max(free, least) or text[start - 1] != " ":
            continue
        free = -negative_end
        cut = max(0, start - characters)
        context = text[cut:start].rstrip()
        if cut and not text[cut - 1].isspace():
            context = context.partition(" ")[2]
        yield Prompt(domain, term, context, text[start - 1 : free])


def asked(benchmark: Benchmark, tokenizer: Any, per_domain: int, pad_id: int, split: str = "test") -> Windows:
    """A window for every prompt: the end of its context, then the first token of its term, the only one predicted."""
    tasks = {task.name: task for task in benchmark.tasks}
    known = key_terms({name: _texts(task.train) for name, task in tasks.items()})
    places = prompts({name: _texts(task.split(split)) for name, task in tasks.items()}, known, per_domain)
    pool, head = Windows(pad_id), first_tokens(tokenizer, benchmark.begin)
    for index, name in enumerate(benchmark.names):
        rows = [_ids(tokenizer, prompt) for prompt in places if prompt.domain == name]
        rows = [[*head, *ids[-(benchmark.max_length - len(head)) :]] for ids in rows]
        lengths = np.array([len(ids) for ids in rows], np.int64)
        flat = np.array([token for ids in rows for token in ids], np.int64)
        stream = Stream(flat, np.empty(0, np.int64), np.empty(0, np.float32))
        pool.add(index, stream, (np.cumsum(lengths) - lengths, lengths, lengths - 1))
    return pool


def _texts(documents: Iterable[Example]) -> Iterator[str]:
    return (example.text for example in islice(documents, SAMPLE))


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a context and of its term up to the first that is more than a blank."""
    before = tokenizer(prompt.context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt.context + prompt.target, add_special_tokens=False)["input_ids"]
    end = len(before) + 1
    while end < len(whole) and not tokenizer.decode(whole[len(before) : end]).strip():
        end += 1
    return whole[:end]


def ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """[...]: 1 + how many of the logits [..., vocabulary] are above the target's; equal ones do not count."""
    own = logits.gather(-1, targets[..., None])
    return 1 + (logits > own).sum(-1)


def rank_figures(found: Sequence[int], domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median rank and mean natural log of the rank, by domain and over `all` prompts; lower is better."""
    values, names = np.asarray(found, dtype=float), np.asarray(domains)
    parts = {"all": values, **{name: values[names == name] for name in dict.fromkeys(domains)}}
    return {
        name: {"median": float(np.median(part)), "mean_log": float(np.log(part).mean())} for name, part in parts.items()
    }
