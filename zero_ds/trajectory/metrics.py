"""The metrics of a trajectory: how far the prediction of a layer is from that of the last layer.

q^l_n is layer l's prediction at position n, and p_n that of the last layer (lens.py, Eq. 1-3 of the paper). A metric
reads one number from every layer at every position, and reduces the numbers of a text to one divergence per layer, in
its unit.

A new metric is one subclass of `Metric`, and nothing else: it is registered in `METRICS` by its name, and the command's
--metric and its help follow. No library is imported at the top because `zero-ds trajectory --help` reads this module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

if TYPE_CHECKING:
    import torch

    from zero_ds.trajectory.lens import FinalLayer, Lens
    from zero_ds.trajectory.transition import Floats

METRICS: dict[str, Metric] = {}
"""Every metric by its name."""

MIN_PROBABILITY = 1e-6
"""Smallest probability of a true token in the `sequence` metric, as in the paper."""


class Metric(ABC):
    """How far the prediction of a layer is from that of the last layer, for one text."""

    name: ClassVar[str]
    """Name for --metric and trajectory.json."""
    description: ClassVar[str]
    """One phrase for --help."""
    unit: ClassVar[str] = "nats"
    """Unit of the divergences, for the plot."""
    needs_final_layer: ClassVar[bool]
    """True if `read` compares each position with the last layer's prediction. Then the last layer itself is not read:
    its divergence is zero by definition. A streamed model runs its layers twice for such a metric."""

    def __init_subclass__(cls) -> None:
        METRICS[cls.name] = cls()

    @abstractmethod
    def read(
        self, lens: Lens, hidden_states: torch.Tensor, targets: torch.Tensor, final: FinalLayer | None
    ) -> torch.Tensor:
        """Returns this metric's number at every row of one layer, float32 (rows,).

        Args:
            hidden_states: (rows, hidden), the layer's output before the final norm, at positions of any texts.
            targets: (rows,), the true next token of every row.
            final: the last layer's prediction at the same rows; None unless `needs_final_layer`.
        """

    @abstractmethod
    def reduce(self, numbers: Floats) -> Floats:
        """Returns the divergence of every layer, (layers,), from a text's numbers, (layers, positions)."""

    def curves(self, numbers: torch.Tensor, lengths: Sequence[int]) -> Floats:
        """Returns the curve of every text, (texts, layers), in the metric's unit.

        Args:
            numbers: (layers, positions), all positions with a next token, text after text.
            lengths: tokens of every text.
        """
        import numpy as np

        ends = np.cumsum([length - 1 for length in lengths])
        of_texts = np.split(numbers.double().cpu().numpy(), ends[:-1], axis=1)
        return np.stack([self.reduce(of_text) for of_text in of_texts])


class SequenceMetric(Metric):
    """The paper's metric: the true next tokens' probabilities, as a distribution over the positions of the text.

        D = sum_n q^l_n log(q^l_n / p_n)    (Eq. 4)

    Here q^l_n and p_n are the probabilities of the true next token at the N - 1 positions that have one, clamped at
    1e-6 and normalised over the positions to a sum of one. Eq. 2 prints the shift between positions and tokens the
    other way round; meant is P[:-1] read at t[1:].
    """

    name = "sequence"
    description = "the paper's, over the probabilities of the true next tokens"
    needs_final_layer = False

    def read(
        self, lens: Lens, hidden_states: torch.Tensor, targets: torch.Tensor, final: FinalLayer | None
    ) -> torch.Tensor:
        """Returns log softmax(norm(X) W^T) at the true next token of every row (Eq. 2, 3)."""
        import torch

        from zero_ds.trajectory.lens import row_chunks

        normed = lens.norm(hidden_states)
        total = torch.full((len(targets),), -torch.inf, device=normed.device)
        chosen = torch.zeros_like(total)
        for first, head in lens.pieces(len(normed)):
            for rows in row_chunks(len(targets)):
                scores = lens.scores(normed[rows], head)
                total[rows] = torch.logaddexp(total[rows], scores.logsumexp(1))
                place = targets[rows] - first
                inside = (place >= 0) & (place < len(head))
                found = scores.gather(1, place.clamp(0, len(head) - 1)[:, None]).squeeze(1)
                chosen[rows] += torch.where(inside, found, 0.0)
        return chosen - total

    def reduce(self, numbers: Floats) -> Floats:
        """Returns Eq. 4 of the log probabilities of the true tokens."""
        import numpy as np

        probs = np.maximum(np.exp(numbers), MIN_PROBABILITY)
        probs /= probs.sum(axis=1, keepdims=True)
        return cast("Floats", (probs * np.log(probs / probs[-1])).sum(axis=1))


class VocabularyMetric(Metric):
    """The usual metric of lens studies: the KL divergence over the vocabulary, averaged over the positions.

    D = mean_n KL(q^l_n || p_n)
    """

    name = "vocabulary"
    description = "KL over the vocabulary, averaged over positions"
    needs_final_layer = True

    def read(
        self, lens: Lens, hidden_states: torch.Tensor, targets: torch.Tensor, final: FinalLayer | None
    ) -> torch.Tensor:
        """Returns KL(q^l || p) over the vocabulary at every row."""
        import torch

        from zero_ds.trajectory.lens import row_chunks

        assert final is not None
        normed = lens.norm(hidden_states)
        own = lens.normalizer(normed)
        result = torch.zeros_like(own)
        for _, head in lens.pieces(len(normed)):
            for rows in row_chunks(len(normed)):
                log_q = lens.scores(normed[rows], head) - own[rows, None]
                log_p = lens.scores(final.normed[rows], head) - final.normalizer[rows, None]
                result[rows] += (log_q.exp() * (log_q - log_p)).sum(1)
        return result

    def reduce(self, numbers: Floats) -> Floats:
        """Returns the mean over the positions."""
        return cast("Floats", numbers.mean(axis=1))
