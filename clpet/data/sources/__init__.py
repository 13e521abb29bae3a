"""Where examples come from, and what each benchmark makes of them."""

from clpet.data.sources.base import Kind, Softmax, Source
from clpet.data.sources.python_stdlib import PythonStdlib
from clpet.data.sources.table import Table
from clpet.data.sources.task_folders import Folders

__all__ = ["Folders", "Kind", "PythonStdlib", "Softmax", "Source", "Table"]
