"""The recorded bytes of what a method stores equal those that lie on disk, in its part of the newest checkpoint.

The tests that train every method check theirs with `check_stored_bytes`.
"""

import json
import struct
from pathlib import Path

import torch

from clpet.metrics.transfer_matrix import TransferMatrix
from clpet.runs.run_dir import task_cost
from clpet.runtime.run_checkpoint import RunState, checkpoints
from clpet.runtime.tree_size import tree_bytes

EXAMPLES = {  # methods that store examples
    "replay",
    "emr",
    "ea_emr",
    "crl",
    "dynamic_conpet",
    "agem",
    "gem",
    "er_ace",
    "recurrent_kif",
    "aim_merging",
    "sapt",
    "der",
    "derpp",
    "wa",
    "bic",
    "ilora",
    "fusion",
    "mbpa",
}


def bytes_on_disk(checkpoint: Path) -> int:
    """Bytes of the tensors of the method, by the file's table of contents, and of the JSON text of its other values."""
    with (checkpoint / "tensors.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        contents = json.loads(file.read(length))
    spans = [entry["data_offsets"] for name, entry in contents.items() if name.startswith("/method/")]

    def text(node) -> int:
        if isinstance(node, dict):
            return 0 if node.keys() == {"__tensor__"} else sum(map(text, node.values()))
        return sum(map(text, node)) if isinstance(node, list) else len(json.dumps(node))

    plain = json.loads((checkpoint / "state.json").read_text())["method"]
    return sum(end - start for start, end in spans) + text(plain)


def check_stored_bytes(run: Path, method: str) -> None:
    """The costs of the last task of a finished run, with the method's own options, are the bytes of its state."""
    cost = json.loads((run / "results.json").read_text())["cost"][-1]
    assert cost["stored_bytes"] == bytes_on_disk(checkpoints(run / "state")[-1]) > 0
    assert (cost["replay_bytes"] > 0) == (method in EXAMPLES)


def test_a_state_by_hand() -> None:
    """Tensors of 6 x 4 and 2 x 8 bytes; 0.25, 12 and "ab" with its quotes are 4, 2 and 4 bytes of text."""
    tree = {"a": torch.zeros(2, 3), "b": [torch.zeros(2, dtype=torch.int64), {"c": 0.25}], "rows": [12], "d": "ab"}
    assert tree_bytes(tree) == 24 + 16 + 4 + 2 + 4


def test_recorded_bytes_lie_on_disk(make, tmp_path: Path) -> None:
    """After two tasks; examples count four bytes a token."""
    run = make("method=replay", "train.epochs=1")
    state = RunState(*[TransferMatrix(run.benchmark.names)] * 2)
    for index, _ in run.method.curriculum()[:2]:
        run.learn(index)
        state.costs.append(task_cost(run.method))
        state.done += 1
    state.save(tmp_path, run.method.state_dict(), {})
    cost = state.costs[-1]
    assert cost["stored_bytes"] == bytes_on_disk(checkpoints(tmp_path)[-1]) > 0
    rows = run.method.stored_rows()
    assert cost["replay_examples"] == len(rows) > 0
    assert cost["replay_bytes"] == 4 * sum(len(run.data.train.tokens(row)) for row in rows)
