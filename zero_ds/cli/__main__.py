"""`python -m zero_ds.cli` is `zero-ds`."""

from zero_ds.cli.main import main

main()
