"""Finds the layer where a language model's early phase ends, from its prediction trajectory.

The steps in their order: `texts` chooses the samples, `resident` or `streaming` run the model on them, `lens` turns the
hidden states of every layer into predictions, `metrics` compares these with the last layer's, `curves` holds the
result, `transition` finds the transition layer in it, and `plot` draws it. `measure` does all of this in one call.
`answers` does the same for one answer of a chat.
"""
