"""Selection of the examples in a small memory: per class by k-means, herding or at random, or stratified by label."""

import math
import warnings
from collections.abc import Callable

import numpy as np

from clpet.data.batches import EncodedDataset
from clpet.replay.batch_plan import Rows


def select_per_class(
    pool: EncodedDataset,
    rows: Rows,
    per_class: int,
    selection: str,
    features: Callable[[Rows], np.ndarray],
    seed: int,
    rng: np.random.Generator,
) -> Rows:
    """Selects at most `per_class` rows of each class, sorted; `selection` is kmeans, random or herding.

    With kmeans a row that is nearest to several centres is listed once for each of them.
    """
    selected: list[int] = []
    for label in np.unique(pool.labels[rows]):
        class_rows = rows[pool.labels[rows] == label]
        count = min(per_class, len(class_rows))
        if selection == "random":
            selected += rng.choice(class_rows, count, replace=False).tolist()
        else:
            vectors = features(class_rows)
            chosen = kmeans_nearest(vectors, count, seed) if selection == "kmeans" else herding(vectors, count)
            selected += class_rows[chosen].tolist()
    return np.array(sorted(selected), dtype=np.int64)


def split_train_val(rows: Rows, share: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Draws ceil(share n) of n rows for training; returns them and the rest, for validation.

    A row that is listed several times is used for training if one of its entries is drawn, and then appears once. In
    ConPET, too, duplicates collapse after the draw.
    """
    order = rng.permutation(rows)
    train = np.unique(order[: math.ceil(round(len(rows) * share, 9))])
    return train, np.setdiff1d(order, train)


def stratified_sample(labels: np.ndarray, rows: Rows, share: float, rng: np.random.Generator) -> Rows:
    """Draws max(1, floor(share n)) of n rows: equally many per label, the remainder from any; none for a share of 0.

    `labels` are those of the whole pool. With more labels than drawn rows, as for free-text answers, the draw is
    uniform.
    """
    if share == 0:
        return rows[:0]
    # 1e-9: 0.29 * 100 must not lose an example to rounding.
    count, order = max(1, int(share * len(rows) + 1e-9)), rng.permutation(rows)
    distinct = np.unique(labels[rows])
    per_label = np.concatenate([order[labels[order] == label][: count // len(distinct)] for label in distinct])
    rest = order[~np.isin(order, per_label)]
    return np.sort(np.concatenate([per_label, rest[: count - len(per_label)]]))


def kmeans_nearest(vectors: np.ndarray, clusters: int, seed: int) -> list[int]:
    """Indices [clusters] of the vector nearest to each k-means centre, sorted (ConPET, section 3.2).

    The best of ten initialisations, the default of scikit-learn when ConPET was published.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than centres
        distances = KMeans(n_clusters=clusters, random_state=seed, n_init=10).fit_transform(vectors)
    return sorted(distances.argmin(0).tolist())


def herding(vectors: np.ndarray, count: int) -> list[int]:
    """Indices chosen one by one, each so that the mean of the chosen vectors is nearest to the class mean.

    iCaRL, algorithm 4 (Rebuffi et al., 2017); ties go to the lower index.
    """
    mean, total = vectors.mean(0), np.zeros(vectors.shape[1])
    chosen: list[int] = []
    for step in range(1, count + 1):
        distance = np.linalg.norm(mean - (total + vectors) / step, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
        total = total + vectors[chosen[-1]]
    return chosen


def random_features(rows: np.ndarray) -> np.ndarray:
    """Random vectors [n, 8] in place of features, for a dry run, in which only the size of the memory matters."""
    return np.random.default_rng(0).normal(size=(len(rows), 8))
