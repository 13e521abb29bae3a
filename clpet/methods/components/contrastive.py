"""What contrastive continual learning is made of: the loss, the distillation of class relations, the bank, the draws.

Formulas of CRL as ConPET runs it (arXiv 2309.14763, section 3.5).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, tau: float, eps: float) -> Tensor:
    """mean_i (1/|P_i|) sum_{a in P_i} -log(e_ia / sum_b e_ib), e_ia = exp(s_ia - max_a s_ia) + eps."""
    s = z @ bank.T / tau
    e = (s - s.amax(1, keepdim=True)).exp() + eps
    terms = -(e / e.sum(1, keepdim=True)).log()
    positive = (labels[:, None] == bank_labels[None]).float()
    return ((terms * positive).sum(1) / positive.sum(1)).mean()


def relation_distillation(z: Tensor, place: Tensor, prototypes: Tensor, means: Tensor, t: float) -> Tensor:
    """[batch]: KL(softmax(t G[y]) || softmax(t z C^T)); G = P P^T of the previous task's normalised prototypes."""
    p = F.normalize(prototypes, dim=1)
    target = (t * (p @ p.T)[place]).softmax(1)
    return F.kl_div((t * z @ means.T).log_softmax(1), target, reduction="none").sum(1)


class Bank:
    """One z per drawn example; sums and counts per class are kept up to date with every refreshed entry."""

    def __init__(self, z: Tensor, labels: np.ndarray, rows: np.ndarray, pool: int, classes: int) -> None:
        self.z, self.known = z.clone(), labels
        self.labels = torch.from_numpy(labels).to(z.device)
        self.place = np.full(pool, -1, dtype=np.int64)
        self.place[rows] = np.arange(len(rows))
        self.sums = z.new_zeros(classes, z.shape[1]).index_add_(0, self.labels, z)

    def update(self, rows: np.ndarray, z: Tensor) -> None:
        """Replaces the entries of `rows`; of a row drawn twice in a batch the first one counts."""
        distinct, first = np.unique(rows, return_index=True)
        places = torch.from_numpy(self.place[distinct]).to(z.device)
        new = z[torch.from_numpy(first).to(z.device)]
        self.sums.index_add_(0, self.labels[places], new - self.z[places])
        self.z[places] = new

    def means(self) -> Tensor:
        """[classes, dim]: class means, normalised."""
        return F.normalize(self.sums, dim=1)

    def sample(self, labels: np.ndarray, count: int, rng: np.random.Generator) -> Tensor:
        """Places of `count` random entries, drawn again until every label of the batch is among them."""
        wanted = np.unique(labels)
        while True:
            places = rng.permutation(len(self.known))[:count]
            if np.isin(wanted, self.known[places]).all():
                return torch.from_numpy(places).to(self.z.device, non_blocking=True)
            if count < len(self.known):
                count = min(len(self.known), count + 1)  # a class of one example would never be met otherwise


def draw(
    labels: np.ndarray, tasks: list[np.ndarray], count: int, at_least: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` of the rows of `tasks`: first up to `at_least` of every class, then draws uniform over tasks; shuffled.

    `labels` [pool] are those of all rows.
    """
    every = rng.permutation(np.concatenate(tasks))
    turns = [every[labels[every] == label][:at_least] for label in np.unique(labels[every])]
    seeds = [turn[place] for place in range(at_least) for turn in turns if place < len(turn)]
    picked = rng.integers(len(tasks), size=count)
    drawn = np.array([rng.choice(tasks[task]) for task in picked], dtype=np.int64)
    return rng.permutation(np.concatenate([np.array(seeds, dtype=np.int64), drawn])[:count])
