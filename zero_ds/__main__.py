"""`python -m zero_ds` is `zero-ds`."""

from zero_ds.cli import main

main()
