"""The predictions of a run: a parquet file per row of the transfer matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clpet.evaluation.evaluator import Evaluation
from clpet.runtime.atomic_io import atomic_file


def write_predictions(
    folder: Path,
    row: int,
    evaluation: Evaluation,
    names: list[str],
    labels: list[str],
    texts: Sequence[str] | None = None,
) -> None:
    """Writes after-NNN.parquet with a row per test example; a prediction is null where no label was seen yet.

    `texts` are those of all examples of the split, by row number, to be written too.
    """
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    table = evaluation.rows

    def dictionary(ids: np.ndarray, words: list[str]) -> pyarrow.Array:
        """The words of ids; null for -1."""
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array(ids, pyarrow.int32(), mask=ids < 0), words)

    columns: dict[str, pyarrow.Array] = {"example": table["row"], "task": dictionary(table["task"], names)}
    for name in ("label", "prediction", "own_prediction", "score"):
        if name in table:
            is_id = np.issubdtype(table[name].dtype, np.integer)  # generated answers are strings, scores are floats
            columns[name] = dictionary(table[name], labels) if is_id else pyarrow.array(table[name].tolist())
    if "probability" in table:
        columns["probability"] = pyarrow.array(table["probability"], mask=np.isnan(table["probability"]))
    columns |= {"text": pyarrow.array([texts[example] for example in table["row"]])} if texts else {}
    columns |= {"selected": dictionary(table["selected"], names)} if "selected" in table else {}
    columns |= {"right_picks": pyarrow.array(table["right_picks"])} if "right_picks" in table else {}
    with atomic_file(folder / f"after-{row:03d}.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
