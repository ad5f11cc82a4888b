"""Code that a `remote-code` export contains, copied next to the weights. It needs transformers and nothing of ours."""
