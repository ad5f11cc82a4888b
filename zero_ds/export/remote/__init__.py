"""Code that a `remote-code` export contains next to the weights. It needs transformers, but not zero_ds."""
