"""zero_ds: train vision encoders against small surrogates of large language models, and graft them."""

__version__ = "0.1.0"
