"""Which examples of a class a small memory keeps."""

import math
import warnings
from collections.abc import Callable

import numpy as np

from clpet.data.batches import EncodedDataset

Rows = np.ndarray


def select_per_class(
    pool: EncodedDataset,
    rows: Rows,
    most: int,
    how: str,
    features: Callable[[Rows], np.ndarray],
    seed: int,
    rng: np.random.Generator,
) -> Rows:
    """At most `most` rows of each class: nearest to the k-means centres, at random, or by herding; in order.

    With k-means a row that is the nearest to several centres is listed once for each of them.
    """
    kept: list[int] = []
    for label in np.unique(pool.labels[rows]):
        own = rows[pool.labels[rows] == label]
        count = min(most, len(own))
        if how == "random":
            kept += rng.choice(own, count, replace=False).tolist()
        else:
            vectors = features(own)
            chosen = kmeans_nearest(vectors, count, seed) if how == "kmeans" else herding(vectors, count)
            kept += own[chosen].tolist()
    return np.array(sorted(kept), dtype=np.int64)


def split_train_val(kept: Rows, share: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """ceil(share n) of the n kept rows, drawn at random, and the rest.

    Of a row that is listed several times one place in the first part is enough (as ConPET draws: duplicates collapse
    after the draw).
    """
    order = rng.permutation(kept)
    first = np.unique(order[: math.ceil(round(len(kept) * share, 9))])
    return first, np.setdiff1d(order, first)


def stratified_sample(labels: np.ndarray, rows: Rows, share: float, rng: np.random.Generator) -> Rows:
    """max(1, floor(share n)) of the rows: equally many of each label, the rest from any; none for a share of 0.

    `labels` are those of the whole pool. Where they outnumber the places, as with single answers, a uniform draw.
    """
    if share == 0:
        return rows[:0]
    count, order = max(1, int(share * len(rows) + 1e-9)), rng.permutation(rows)  # 0.29 * 100 must not lose one
    known = np.unique(labels[rows])
    first = np.concatenate([order[labels[order] == label][: count // len(known)] for label in known])
    rest = order[~np.isin(order, first)]
    return np.sort(np.concatenate([first, rest[: count - len(first)]]))


def kmeans_nearest(vectors: np.ndarray, clusters: int, seed: int) -> list[int]:
    """[clusters]: the example nearest to each of k centres, in ascending order (ConPET, section 3.2).

    The best of ten starts, as by default in the scikit-learn of ConPET's time.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than centres
        distances = KMeans(n_clusters=clusters, random_state=seed, n_init=10).fit_transform(vectors)
    return sorted(distances.argmin(0).tolist())


def herding(vectors: np.ndarray, count: int) -> list[int]:
    """Greedy choice that keeps the mean of the chosen close to the class mean (Rebuffi et al., 2017)."""
    mean, total = vectors.mean(0), np.zeros(vectors.shape[1])
    chosen: list[int] = []
    for step in range(1, count + 1):
        distance = np.linalg.norm(mean - (total + vectors) / step, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
        total = total + vectors[chosen[-1]]
    return chosen


def random_features(rows: np.ndarray) -> np.ndarray:
    """[n, 8] vectors without a meaning, for a memory that is only counted."""
    return np.random.default_rng(0).normal(size=(len(rows), 8))
