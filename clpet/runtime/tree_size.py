"""The size of a state: what a checkpoint's part takes on disk."""

import json
from collections.abc import Mapping

import torch

from clpet.records import Tree


def tree_bytes(tree: Tree) -> int:
    """Bytes of the values of a state in a checkpoint: tensors in tensors.safetensors, all others in state.json.

    A number or a string counts with its JSON text, such as 3 bytes for 0.5; names, brackets and commas do not count.
    """
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(map(tree_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tree_bytes, tree))
    return len(json.dumps(tree).encode())
