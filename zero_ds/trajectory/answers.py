"""The trajectory of one answer: what every layer would have predicted in the place of each of the answer's tokens.

Source: Eq. 1-3 of the paper, read at the positions that predict the answer's tokens. The divergence is that of the
`vocabulary` metric (metrics.py), KL(q^l || p), with one value per position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from zero_ds.model.decoding import Context, Reader
from zero_ds.trajectory.lens import ResidentLens, tapped
from zero_ds.trajectory.plot import draw_curves
from zero_ds.trajectory.transition import Floats

COLUMNS = 14
"""Number of the answer's tokens whose words are drawn; the curves show all tokens."""
ROWS = 64
"""Number of positions that are read at a time: 32 MB of float32 for a vocabulary of 128k."""
LETTERS = 9
"""Number of letters that fit into a word's cell."""


@dataclass(frozen=True)
class AnswerTrajectory:
    """An answer of n tokens, including the one that closes it, in a decoder of L layers."""

    tokens: tuple[str, ...]
    """Tokens of the answer, (n,)."""
    predicted: tuple[tuple[str, ...], ...]
    """Most probable token of every layer in their places, (L, n)."""
    divergences: Floats
    """Divergences from the last layer's prediction, (L, n), in nats; the last layer's own are zero."""
    translators: tuple[int, ...] = ()
    """Numbers of the layers that are a surrogate's translators."""


@torch.inference_mode()
def read_answer(
    reader: Reader, context: Context, prompt: list[int], answer: list[int], tokenizer: Any
) -> AnswerTrajectory:
    """Runs the model over the answer once more, with the lens on every layer.

    Args:
        context: one row that begins with the prompt's tokens, perhaps with more tokens after them.
        prompt: token ids, not empty.
        answer: token ids, not empty.
    """
    model = reader.model
    lens = ResidentLens(model.decoder, model.family)
    states: list[torch.Tensor] = []
    before = context.rows(torch.tensor([0], device=reader.device), len(prompt) - 1)
    with tapped(model.family.layers(model.decoder), lambda _, output: states.append(output[0].to(reader.device))):
        reader.extend(before, [[prompt[-1], *answer[:-1]]])
    normed = [lens.norm(state) for state in states]
    curves = np.zeros((len(states), len(answer)))
    best = torch.zeros((len(states), len(answer)), dtype=torch.long)
    for start in range(0, len(answer), ROWS):
        rows = slice(start, start + ROWS)
        log_p = _log_probs(lens, normed[-1][rows])
        for number, state in enumerate(normed):
            log_q = _log_probs(lens, state[rows])
            best[number, rows] = log_q.argmax(1).cpu()
            curves[number, rows] = (log_q.exp() * (log_q - log_p)).sum(1).double().cpu().numpy()
    return AnswerTrajectory(
        tokens=_words(answer, tokenizer),
        predicted=tuple(_words(layer, tokenizer) for layer in best.tolist()),
        divergences=curves,
        translators=tuple(model.plan.translators) if model.plan is not None else (),
    )


def _log_probs(lens: ResidentLens, normed: torch.Tensor) -> torch.Tensor:
    """Returns log probabilities (rows, vocabulary) of final-normed states (rows, hidden), of few rows only."""
    return torch.cat([lens.scores(normed, head) for _, head in lens.pieces(len(normed))], dim=1).log_softmax(1)


def _words(tokens: list[int], tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(tokenizer.decode([token])) for token in tokens)


def draw(trajectory: AnswerTrajectory, title: str) -> Image.Image:
    """Draws one curve per token on the left, in the look of Figure 3, and every layer's words on the right.

    The background of a word is the darker, the further its layer's prediction is from the last one's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, count = trajectory.divergences.shape
    words_width = 0.62 * max(4, min(count, COLUMNS))
    figure = Figure(figsize=(4.6 + 0.25 + words_width, 1.4 + 0.19 * max(10, layers)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=(4.2, 0.25 + words_width))
    draw_curves(left, trajectory.divergences.T, "nats")
    left.legend(loc="upper right", frameon=False)
    for layer in trajectory.translators:
        left.axvline(layer, linestyle=":", linewidth=0.8, color="gray")
    _draw_words(right, trajectory)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_words(axes: Any, trajectory: AnswerTrajectory) -> None:
    """Draws the most probable token of every layer for the first COLUMNS tokens of the answer."""
    layers, count = trajectory.divergences.shape
    columns = min(count, COLUMNS)
    shown = trajectory.divergences[:, :columns]
    axes.imshow(shown, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=max(1e-3, 1.6 * float(shown.max())))
    for layer in range(layers):
        for column in range(columns):
            word = trajectory.predicted[layer][column]
            axes.text(
                column,
                layer,
                _cell(word),
                ha="center",
                va="center",
                fontsize=6,
                fontweight="bold" if word == trajectory.tokens[column] else "normal",
                parse_math=False,
            )
    axes.set_xticks(range(columns), [_cell(word) for word in trajectory.tokens[:columns]], fontsize=7, rotation=40)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
    names = [f"{layer} translator" if layer in trajectory.translators else str(layer) for layer in range(layers)]
    axes.set_yticks(range(layers), names, fontsize=6)
    axes.set_xlabel("token of the answer" if columns == count else f"first {columns} of {count} tokens of the answer")
    axes.set_title("most probable token of every layer (bold: the answer's own)", fontsize=8)


def _cell(word: str) -> str:
    """Returns a token as a plot can show it: white space visible, letters that fonts lack as a dot, long words cut."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x500 else "\N{MIDDLE DOT}" for c in word.strip(" "))
    shown = shown or ("\N{OPEN BOX}" if word else "\N{MIDDLE DOT}")
    return shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
