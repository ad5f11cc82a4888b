"""The model card of an export: base models, recipe, licence, proof, and metrics if the run was evaluated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from zero_ds.evaluation.heldout.results import CONDITIONS, Evaluation, read_evaluation
from zero_ds.export.formats import ExportFormat
from zero_ds.export.source import Source
from zero_ds.runtime.errors import ConfigError

_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""Folder of a model in the hub's cache."""
_FRONT_MATTER = re.compile(r"---\n(.*?)\n---", re.S)


def model_card(
    source: Source, layout: ExportFormat, name: str, proof: dict[str, Any], evaluations: list[Evaluation]
) -> str:
    """Returns the text of README.md. It contains no path of this machine: local models go by their folder's name.

    name: name of the exported folder; proof: content of proof.json.
    """
    base = [model_name(source.config.target)]
    if source.sees:
        base.append(model_name(source.encoder_config.path))
    licence, licensor = _licence(source, base)
    front_matter: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if source.sees else "text-generation",
        "license": licence or "other",
        "tags": ["zero-shot-vision-encoder-grafting", layout.tag] if source.sees else [layout.tag],
    }
    if evaluations:
        front_matter["model-index"] = [{"name": name, "results": [_result(one) for one in evaluations]}]
    usage = layout.usage.format(name=name, background=source.config.data.image_background)
    parts = [
        "---\n" + yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        _description(source, base),
        "## Usage\n\n```python\n" + usage + "```",
        "## Training\n\n" + _recipe(source),
        "## Proof\n\n" + proof_sentence(proof) + " Details are in `proof.json`.",
    ]
    if evaluations:
        parts.append("## Evaluation\n\n" + _evaluation_table(evaluations))
    if licence is None:
        known = "None of the base models' folders names one: fill in `license` above before you publish this."
    else:
        known = f"The card of {licensor} names `{licence}`."
    parts.append(f"## Licence\n\nThe licences of the base models and of the training data apply. {known}")
    return "\n\n".join(parts) + "\n"


def proof_sentence(proof: dict[str, Any]) -> str:
    """Returns sentences about the extent of the proof."""
    if proof["kind"] == "tensors":
        return (
            f"All {proof['tensors_equal']} tensors were read again and are those of the source. The model was NOT "
            "loaded and no answers were compared (`--proof tensors`)."
        )
    seen = " with and without an image" if any(line["picture"] for line in proof["prompts"]) else ""
    return (
        f"All {proof['tensors_equal']} tensors are those of the source. Loaded afresh by transformers alone "
        f"(`{proof['loaded_by_transformers']}`, {proof['dtype']}), logits are within "
        f"{proof['largest_logit_difference']:.1e} of the source on {len(proof['prompts'])} prompts{seen}, and "
        "greedy answers are equal."
    )


def model_name(path: str) -> str:
    """Returns the public name of a model: its hub id, also from a path in the hub's cache, or its folder's name."""
    if match := _HUB_CACHE.search(path):
        return f"{match[1]}/{match[2]}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists():
        return path
    return Path(path).expanduser().resolve().name


def read_evaluations(paths: list[Path]) -> list[Evaluation]:
    """Reads results of `zero-ds eval`.

    Raises:
        ConfigError: a file that is missing or not such a result.
    """
    try:
        return [read_evaluation(path) for path in paths]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--evaluation: {error}.") from None


def _licence(source: Source, base: list[str]) -> tuple[str | None, str | None]:
    """Returns the licence that the decoder's or the vision encoder's own card names, and the name of that model."""
    folders = [source.decoder.path, *([source.encoder_folder] if source.sees else [])]
    for name, folder in zip(base, folders, strict=True):
        licence = _read_licence(folder)
        if licence is not None:
            return licence, name
    return None, None


def _read_licence(folder: Path) -> str | None:
    """Returns `license` in the front matter of a model folder's own card; None if there is none."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    match = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return None
    try:
        front_matter = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return None
    licence = front_matter.get("license") if isinstance(front_matter, dict) else None
    return licence or None if isinstance(licence, str) else None


def _description(source: Source, base: list[str]) -> str:
    plan = source.decoder.plan
    if not source.sees:
        of = base[0] if plan is None else f"A surrogate {plan} of {base[0]}"
        return f"{of}, trained on text in the stage `{source.config.stage}`."
    if plan is not None:
        model = f"A surrogate {plan} of {base[0]} with the vision encoder that was trained against it"
    else:
        model = f"{base[0]} with a vision encoder ({base[1]}) that was trained in the stage `{source.config.stage}`"
    return (
        f"{model}, by [zero-shot vision encoder grafting](https://arxiv.org/abs/2505.22664). Images are padded to a "
        f"square with the mean colour; each becomes {source.tokens_per_image} image tokens."
    )


def _recipe(source: Source) -> str:
    """Returns a table of the recipe, without paths of the machine that ran it."""
    config, manifest = source.config, source.checkpoint.manifest
    rows: dict[str, Any] = {
        "stage": config.stage,
        "steps": source.checkpoint.step,
        "decoder in training": "surrogate" if manifest.get("plan") else "full model",
        "global batch": config.global_batch,
        "learning rate": config.optimizer.learning_rate,
        "DeepSpeed config": config.zero,
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, merged" if config.lora else None,
        "data": ", ".join(Path(entry.path).name for entry in config.data.sources) or None,
        "seed": config.seed,
        "versions": json.dumps(manifest.get("versions", {})),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _correct_words(evaluation: Evaluation, condition: str) -> tuple[float, int]:
    """Returns the share of correct words in free answers under a condition, and the number of words."""
    words = [word for item in evaluation.of(condition) for word in item.words]
    return sum(word.free_correct for word in words) / max(1, len(words)), len(words)


def _result(evaluation: Evaluation) -> dict[str, Any]:
    """Returns an entry of `model-index`."""
    share, _ = _correct_words(evaluation, CONDITIONS[0])
    return {
        "task": {"type": "image-text-to-text"},
        "dataset": {"name": evaluation.name, "type": "held-out questions"},
        "metrics": [{"type": "accuracy", "value": round(100 * share, 2), "name": "right words, free answers (%)"}],
    }


def _evaluation_table(evaluations: list[Evaluation]) -> str:
    rows = ["| evaluation | right words | with a shuffled image | words |", "|---|---|---|---|"]
    own_image, shuffled_image = CONDITIONS
    for evaluation in evaluations:
        own, count = _correct_words(evaluation, own_image)
        shuffled, _ = _correct_words(evaluation, shuffled_image)
        name = " ".join(evaluation.name.replace("|", "\\|").split())
        rows.append(f"| {name} | {own:.1%} | {shuffled:.1%} | {count} |")
    return "\n".join(rows)
