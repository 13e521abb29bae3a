"""clpet: continual learning of language models, one command per experiment."""

__version__ = "0.1.0"
