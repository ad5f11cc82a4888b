"""The prediction trajectory of one answer: what every layer would have said in the place of each of its tokens.

Source: Eq. 1-3 of the paper, read at the positions that predict the answer's tokens; the distance is that of the
`vocabulary` metric (lens.py), KL(q^l || p), one value a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from zero_ds.model.decoding import Context, Reader
from zero_ds.trajectory.lens import Floats, ResidentLens, tapped
from zero_ds.trajectory.trajectory import draw_curves

COLUMNS = 14
"""Tokens of an answer whose words are drawn; the curves are of all."""
ROWS = 64
"""Tokens that are read at a time: 32 MB of float32 for a vocabulary of 128k."""
LETTERS = 9
"""Letters of a word that fit into its cell."""


@dataclass(frozen=True)
class AnswerTrajectory:
    """An answer of n tokens, the one that closes it among them, in a decoder of L layers."""

    said: tuple[str, ...]
    """(n,): the answer's tokens."""
    read: tuple[tuple[str, ...], ...]
    """(L, n): the most probable token of every layer in their places."""
    divergences: Floats
    """(L, n), in nats, from the last layer's prediction; the last layer's own are zero."""
    translators: tuple[int, ...] = ()
    """Layers that are a surrogate's translators."""


@torch.inference_mode()
def read_answer(
    reader: Reader, context: Context, prompt: list[int], answer: list[int], tokenizer: Any
) -> AnswerTrajectory:
    """Reads the answer once more, with the lens on every layer.

    context: one row that holds the prompt's tokens, perhaps more behind them; prompt, answer: token ids, neither empty.
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
        said=_words(answer, tokenizer),
        read=tuple(_words(layer, tokenizer) for layer in best.tolist()),
        divergences=curves,
        translators=tuple(model.plan.translators) if model.plan is not None else (),
    )


def _log_probs(lens: ResidentLens, normed: torch.Tensor) -> torch.Tensor:
    """(rows, hidden) -> (rows, vocabulary), of the few rows of an answer."""
    return torch.cat([lens.scores(normed, head) for _, head in lens.pieces(len(normed))], dim=1).log_softmax(1)


def _words(tokens: list[int], tokenizer: Any) -> tuple[str, ...]:
    return tuple(str(tokenizer.decode([token])) for token in tokens)


def draw(trajectory: AnswerTrajectory, title: str) -> Image.Image:
    """Left the curves in the look of Figure 3, one a token; right every layer's words, dark where they are far off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, count = trajectory.divergences.shape
    columns = min(count, COLUMNS)
    figure = Figure(figsize=(4.6 + 0.25 + 0.62 * max(4, columns), 1.4 + 0.19 * max(10, layers)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=(4.2, 0.25 + 0.62 * max(4, columns)))
    draw_curves(left, trajectory.divergences.T)
    left.legend(loc="upper right", frameon=False)
    for layer in trajectory.translators:
        left.axvline(layer, linestyle=":", linewidth=0.8, color="gray")

    far = trajectory.divergences[:, :columns]
    right.imshow(far, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=max(1e-3, 1.6 * float(far.max())))
    for layer in range(layers):
        for place in range(columns):
            same = trajectory.read[layer][place] == trajectory.said[place]
            right.text(
                place,
                layer,
                _cell(trajectory.read[layer][place]),
                ha="center",
                va="center",
                fontsize=6,
                fontweight="bold" if same else "normal",
                parse_math=False,
            )
    right.set_xticks(range(columns), [_cell(word) for word in trajectory.said[:columns]], fontsize=7, rotation=40)
    for label in right.get_xticklabels():
        label.set_parse_math(False)
    names = [f"{layer} translator" if layer in trajectory.translators else str(layer) for layer in range(layers)]
    right.set_yticks(range(layers), names, fontsize=6)
    right.set_xlabel("token of the answer" if columns == count else f"first {columns} of {count} tokens of the answer")
    right.set_title("most probable token of every layer (bold: the one said)", fontsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _cell(word: str) -> str:
    """A token as a plot can show it: white space visible, letters that no font has as a dot."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x500 else "\N{MIDDLE DOT}" for c in word.strip(" "))
    shown = shown or ("\N{OPEN BOX}" if word else "\N{MIDDLE DOT}")
    return shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
