"""The output layer over the vocabulary, applied to some of the hidden states only."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from clpet.models.protocols import Network


@contextlib.contextmanager
def selecting(model: Network, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output layer is applied to the states that `select` returns: logits of all would need much memory."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: (select(hidden[0]),))
    try:
        yield
    finally:
        hook.remove()
