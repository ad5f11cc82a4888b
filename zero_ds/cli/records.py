"""`zero-ds eval records`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def records(
    weights: Annotated[Path, typer.Option(help="Run or commit folder with a trained encoder.")],
    decoder: Annotated[
        str, typer.Option(help="Language model it is plugged into: its surrogate, or its target (the graft).")
    ],
    records: Annotated[Path, typer.Option(help="Evaluation records: JSON list of questions about pictures.")],
    out: Annotated[Path, typer.Option(help="Result file (JSON).")],
    name: Annotated[str | None, typer.Option(help="Name in tables and plots; else the result file's.")] = None,
    pictures: Annotated[int | None, typer.Option(help="Use only the first n pictures.", min=2)] = None,
    batch: Annotated[int, typer.Option(help="Records per pass.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Which picture the control shows instead of a record's own.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    accept: Annotated[
        list[str] | None, typer.Option(help="Graft in spite of a difference that `zero-ds graft` names.")
    ] = None,
) -> None:
    """Ask about held-out pictures: free answers and forced choice, with the right picture and with a shuffled one."""
    from zero_ds.cli.models import precision
    from zero_ds.evaluation.heldout.records import read_records
    from zero_ds.evaluation.heldout.run import CONDITIONS
    from zero_ds.evaluation.heldout.run import evaluate as run
    from zero_ds.grafting.compatibility import run_config
    from zero_ds.grafting.generate import Answerer
    from zero_ds.grafting.load import load_graft, load_trained
    from zero_ds.model.build import sample_encoder
    from zero_ds.runtime.errors import ConfigError
    from zero_ds.runtime.hub import local_folder
    from zero_ds.training.checkpoint.checkpoint import find_commit

    kind = precision(dtype)
    questions = read_records(records, limit_pictures=pictures)
    commit = find_commit(weights)
    config = run_config(commit)
    if config.encoder is None:
        raise ConfigError(f"{weights} has no vision encoder; name the run of an encoder stage.")
    folder = local_folder(decoder)
    if (folder / "surrogate.json").is_file():
        model = load_trained(weights, str(folder), dtype=kind, attention="eager")
    else:
        model = load_graft(weights, str(folder), accept=accept or (), dtype=kind, attention="eager")
    encode = sample_encoder(model, folder, local_folder(config.encoder.path), config.data)
    answerer = Answerer(model, encode, batch_size=batch, max_new_tokens=max_new_tokens)
    setting = {"weights": str(commit.folder), "decoder": decoder, "stage": config.stage}
    result = run(answerer, questions, name or out.stem, seed=seed, setting=setting)
    result.write(out)
    for condition in CONDITIONS:
        words = [word for item in result.of(condition) for word in item.words]
        free = sum(word.free_correct for word in words) / max(1, len(words))
        forced = sum(word.forced_correct for word in words) / max(1, len(words))
        print(f"{result.name}, {condition} pictures: {free:.1%} of {len(words)} words free, {forced:.1%} forced choice")
