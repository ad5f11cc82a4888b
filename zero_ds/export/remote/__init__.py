"""The code that a `remote-code` export carries, copied beside the weights: it needs transformers, nothing of ours."""
