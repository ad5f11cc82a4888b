"""The model card of an export: base models, recipe, licence, proof, and metrics where it was evaluated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from zero_ds.evaluation.heldout.results import CONDITIONS, Evaluation, read_evaluation
from zero_ds.export.source import Source
from zero_ds.runtime.errors import ConfigError

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def card(source: Source, usage: str, name: str, form: str, proof: dict[str, Any], evaluations: list[Evaluation]) -> str:
    """Text of README.md. No path of this machine stands in it: a model in a folder goes by the folder's name."""
    base = [model_name(source.config.target), model_name(source.encoder_config.path)]
    licence = next((found for found in map(_licence, (source.folder, source.encoder_folder)) if found), None)
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": licence or "other",
        "tags": ["zero-shot-vision-encoder-grafting", "llava" if form == "llava" else "custom_code"],
    }
    if evaluations:
        front["model-index"] = [{"name": name, "results": [_result(one) for one in evaluations]}]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        _what(source, base),
        "## Usage\n\n```python\n" + usage.format(name=name) + "```",
        "## Training\n\n" + _training(source),
        "## Proof\n\n" + proof_sentence(proof) + " Details are in `proof.json`.",
    ]
    if evaluations:
        parts.append("## Evaluation\n\n" + _table(evaluations))
    known = f"The card of {base[0] if _licence(source.folder) else base[1]} names `{licence}`." if licence else ""
    parts.append(
        "## Licence\n\nThe licences of the base models and of the training data apply. "
        + (known or "None of the base models' folders names one: fill in `license` above before you publish this.")
    )
    return "\n\n".join(parts) + "\n"


def proof_sentence(proof: dict[str, Any]) -> str:
    """What was proved, and what was not."""
    if proof["kind"] == "tensors":
        return (
            f"All {proof['tensors_equal']} tensors were read again and are those of the source. The model was NOT "
            "loaded and no answers were compared (`--proof tensors`)."
        )
    return (
        f"All {proof['tensors_equal']} tensors are those of the source. Loaded afresh by transformers alone "
        f"(`{proof['loaded_by_transformers']}`, {proof['dtype']}), logits are within "
        f"{proof['largest_logit_difference']:.1e} of the source on {len(proof['prompts'])} prompts with and without a "
        "picture, and greedy answers are equal."
    )


def model_name(path: str) -> str:
    """A hub id as it is, also out of the hub's cache; of a folder its name."""
    if match := _CACHED.search(path):
        return f"{match[1]}/{match[2]}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists():
        return path
    return Path(path).expanduser().resolve().name


def _licence(folder: Path) -> str | None:
    """`license` of a model folder's own card."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _what(source: Source, base: list[str]) -> str:
    how = (
        f"A surrogate {source.plan} of {base[0]} with the vision encoder that was trained against it"
        if source.plan
        else f"{base[0]} with a vision encoder ({base[1]}) that was trained in the stage `{source.config.stage}`"
    )
    return (
        f"{how}, by [zero-shot vision encoder grafting](https://arxiv.org/abs/2505.22664). Pictures are padded to a "
        f"square with the mean colour; one is {source.tokens_per_image} image tokens."
    )


def _training(source: Source) -> str:
    """The recipe, without the paths of the machine that ran it."""
    config = source.config
    rows: dict[str, Any] = {
        "stage": config.stage,
        "steps": source.commit.step,
        "decoder in training": str((source.commit.manifest.get("plan") and "surrogate") or "full model"),
        "global batch": config.global_batch,
        "learning rate": config.optimizer.learning_rate,
        "DeepSpeed config": config.zero,
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, merged" if config.lora else None,
        "data": ", ".join(Path(entry.path).name for entry in config.data.sources) or None,
        "seed": config.seed,
        "versions": json.dumps(source.commit.manifest.get("versions", {})),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _share(evaluation: Evaluation, condition: str) -> tuple[float, int]:
    """Share of right words in free answers, and how many words there were."""
    words = [word for item in evaluation.of(condition) for word in item.words]
    return sum(word.free_correct for word in words) / max(1, len(words)), len(words)


def _result(evaluation: Evaluation) -> dict[str, Any]:
    share, _ = _share(evaluation, CONDITIONS[0])
    return {
        "task": {"type": "image-text-to-text"},
        "dataset": {"name": evaluation.name, "type": "held-out questions"},
        "metrics": [{"type": "accuracy", "value": round(100 * share, 2), "name": "right words, free answers (%)"}],
    }


def _table(evaluations: list[Evaluation]) -> str:
    rows = ["| evaluation | right words | with a shuffled picture | words |", "|---|---|---|---|"]
    for one in evaluations:
        (own, count), (shuffled, _) = (_share(one, condition) for condition in CONDITIONS)
        name = " ".join(one.name.replace("|", "\\|").split())
        rows.append(f"| {name} | {own:.1%} | {shuffled:.1%} | {count} |")
    return "\n".join(rows)


def read_evaluations(paths: list[Path]) -> list[Evaluation]:
    """Results of `zero-ds eval`.

    Raises:
        ConfigError: a file that is none.
    """
    try:
        return [read_evaluation(path) for path in paths]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--evaluation: {error}.") from None
