"""Sources: where the examples of a benchmark come from.

To add a data format:

- another file type for tables: a reader in `clpet/data/tabular_files.py` (`read_table`); for plain text: a class with
  the methods of `Reader` in `clpet/data/document_readers.py` (`open_readers`); all sources can then read it;
- another published layout of entity data: two functions and a line of LAYOUTS in `entity_formats.py`;
- a benchmark with its own structure: a dataclass in a new module of this package, named by `_target_` in a YAML in
  `conf/benchmark/`. For labelled data derive from `Source` and override `read`, which returns the splits of every task;
  for plain text derive from `Domains` in `text_domains.py` and override `names` and `corpora`. Its fields are the
  options of the benchmark. Report what is skipped, repaired or dropped in `self.report`; raise DataError otherwise.
"""

from clpet.data.sources.base import Softmax, Source
from clpet.data.sources.python_stdlib import PythonStdlib
from clpet.data.sources.table import Table
from clpet.data.sources.task_folders import Folders

__all__ = ["Folders", "PythonStdlib", "Softmax", "Source", "Table"]
