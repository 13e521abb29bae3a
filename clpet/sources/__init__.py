"""Where examples come from, and what each benchmark makes of them."""

from clpet.sources.base import Kind, Softmax, Source
from clpet.sources.python_stdlib import PythonStdlib
from clpet.sources.table import Table
from clpet.sources.task_folders import Folders

__all__ = ["Folders", "Kind", "PythonStdlib", "Softmax", "Source", "Table"]
