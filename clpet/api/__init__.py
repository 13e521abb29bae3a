"""The Python API: trains, opens and compares runs from a program or a notebook, with the words of the command line.

`clpet/__init__.py` offers its names as `clpet.train`, `clpet.load` and so on. Importing this package imports no torch.
"""
