"""Translators trained offline, on one device, from hidden states of the target that were computed once.

The steps in their order: `samples` lets the target write texts where asked, `corpus` reads the texts, `states` runs the
target over them one layer at a time and keeps the hidden states on disk, `student` is the part of the surrogate that
has to run, `quality` judges it on texts that are held out, and `translate` trains it. The result is a checkpoint like
that of stage `translator`. This is an option beyond the paper.
"""
