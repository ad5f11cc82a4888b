"""Incremental decoding: appends tokens and images to a key-value cache, and predicts the tokens after them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch

from zero_ds.data.samples import image_positions
from zero_ds.model.vlm import VisionLanguageModel

LOGITS_BYTES = 64 << 20
"""Bytes of float32 logits that are held at a time."""

Spot = tuple[int, int]
"""Number of a row of hidden states, and a token that may follow it."""


class Context:
    """Sequences that a decoder has read: the key-value cache, and the columns of it that belong to each row.

    Rows may have gaps anywhere. `filled` (rows, columns) is the attention mask; positions count filled columns.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        self.filled = torch.zeros((rows, 0), dtype=torch.long, device=device)

    def rows(self, numbers: torch.Tensor, columns: int | None = None) -> Context:
        """Returns a copy with the given rows, each any number of times, and only the first `columns` columns."""
        chosen = Context(len(numbers), self.filled.device)
        chosen.filled = self.filled[numbers, :columns]
        for number, layer in enumerate(self.cache.layers):
            keys, values = cast(Any, layer).keys[:, :, :columns], cast(Any, layer).values[:, :, :columns]
            chosen_rows = numbers.to(keys.device)  # a layer on another GPU keeps its part of the cache there
            chosen.cache.update(keys.index_select(0, chosen_rows), values.index_select(0, chosen_rows), number)
        return chosen


class Reader:
    """A model's decoder with its own caches, without gradient."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self._head: torch.nn.Module | None = None  # float32 copy of the output head, made when it is needed

    def extend(
        self, context: Context, rows: Sequence[Sequence[int]], features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Appends tokens to every row of a context and returns their hidden states: (rows, longest, hidden).

        The rows are padded on the right. If the context is empty, every row needs a token, because every position has
        to attend to something. features: as in `embeddings`.
        """
        longest = max(len(row) for row in rows)
        padded = [list(row) + [0] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, dtype=torch.long, device=self.device)
        filled = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        embeddings = self.embeddings(ids, features)
        if longest == 0:
            return embeddings
        positions = context.filled.sum(1, keepdim=True) + filled.cumsum(1) - 1
        context.filled = torch.cat([context.filled, filled], dim=1)
        backbone = cast(Any, self.model.family.inner(self.model.decoder))
        output = backbone(
            inputs_embeds=embeddings,
            attention_mask=context.filled,
            position_ids=positions,
            past_key_values=context.cache,
            use_cache=True,
        )
        return cast(torch.Tensor, output.last_hidden_state)

    def embeddings(self, ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """Returns the decoder's inputs: (rows, seq) -> (rows, seq, hidden).

        features: (image positions, hidden), of all images of these rows, one after the other.
        """
        embeddings = self.model.embed(ids, None)
        if features is None or not ids.numel():
            return embeddings
        return embeddings.masked_scatter(image_positions(ids).unsqueeze(-1), features.to(embeddings.dtype))

    def read(self, hidden: torch.Tensor, wanted: Collection[Spot] = ()) -> tuple[list[int], dict[Spot, float]]:
        """Returns the most probable token of every row, and the log-probability of every wanted (row, token).

        hidden: (rows, hidden). In bf16 a logit of 20 is known to 0.1 only, and one position in twenty has two equal
        logits at the top, of which the same one would always win. Such positions, and those with wanted tokens, go
        through the head a second time in float32.
        """
        vocabulary = cast(Any, self.model.decoder).get_input_embeddings().weight.shape[0]
        step = max(1, LOGITS_BYTES // (4 * vocabulary))
        tokens_of: dict[int, list[int]] = {}
        for row, token in wanted:
            tokens_of.setdefault(row, []).append(token)
        greedy: list[int] = []
        known: dict[Spot, float] = {}
        for start in range(0, len(hidden), step):
            part = hidden[start : start + step]
            logits = self.model.logits(part).float()
            top = logits.topk(2, dim=1)
            best = top.indices[:, 0]
            tied = (top.values[:, 0] == top.values[:, 1]).tolist()
            asked = [row for row in range(len(part)) if start + row in tokens_of or tied[row]]
            if asked:
                rows = torch.tensor(asked, device=self.device)
                exact = self._exact_logits(part[rows]) if part.dtype != torch.float32 else logits[rows]
                best[rows] = exact.argmax(1)
                log_probs = exact.log_softmax(1).cpu()
                for place, row in enumerate(asked):
                    for token in tokens_of.get(start + row, ()):
                        known[start + row, token] = float(log_probs[place, token])
            greedy += best.tolist()
        return greedy, known

    def _exact_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits computed with a float32 copy of the output head."""
        decoder = cast(Any, self.model.decoder)
        head = decoder.get_output_embeddings()
        if self._head is None:
            self._head = copy.deepcopy(head).float()
        decoder.set_output_embeddings(self._head)
        try:
            return self.model.logits(hidden.float())
        finally:
            decoder.set_output_embeddings(head)


def generate_from(decoder: Any, embeddings: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Returns the tokens that a decoder generates after embeddings (rows, seq, hidden): (rows, new tokens).

    settings: arguments of transformers' `generate`. Classes whose `generate` takes no embeddings get token ids, and
    their first lookup finds the embeddings.
    """
    accepted = inspect.signature(decoder.prepare_inputs_for_generation).parameters
    if "inputs_embeds" in accepted:
        output: torch.Tensor = decoder.generate(inputs_embeds=embeddings, **settings)
        return output
    ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    pending = [embeddings]
    handle = decoder.get_input_embeddings().register_forward_hook(
        lambda module, inputs, looked_up: pending.pop() if pending else looked_up
    )
    try:
        whole: torch.Tensor = decoder.generate(input_ids=ids, **settings)
        return whole[:, ids.shape[1] :]
    finally:
        handle.remove()
