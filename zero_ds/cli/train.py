"""`zero-ds train`: one training stage in this process, or the run that it would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.cli.options import complete_recipe

if TYPE_CHECKING:
    from zero_ds.config.schema import RunConfig


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a recipe (see `zero-ds recipes`), such as smollm2-135m/encoder; or a YAML file.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the recipe's, such as zero=zero2 optimizer.learning_rate=1e-4."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the run, print it with all its settings, and stop.")
    ] = False,
) -> None:
    """Train one stage in this process alone.

    launch/train.sh trains on all GPUs of this machine, or on the machines of a hostfile. A run that was interrupted
    resumes from its last checkpoint when the same command is given again.

    Example: zero-ds train smollm2-135m/encoder max_steps=100 --dry-run
    """
    from zero_ds.config.loading import load_run

    config = load_run(recipe, overrides)
    if dry_run:
        _print_run(config)
        return
    from zero_ds.training.train import train as run

    run(config)


def _print_run(config: RunConfig) -> None:
    """Checks a run as far as its configuration goes, and prints it; loads neither torch nor DeepSpeed."""
    import json

    from zero_ds.config.batches import describe_batches, fit_to_ranks
    from zero_ds.runtime.environment import launched_ranks
    from zero_ds.training import stages
    from zero_ds.training.deepspeed import ds_config

    stage = stages.stage_of(config)
    ranks = launched_ranks()
    asked, config = config.micro_batch, fit_to_ranks(config, ranks)
    print(config.dump().rstrip())
    for remark in stages.remarks(config):
        print(f"# {remark}")
    print(f"# trains {', '.join(stages.trained_parts(config))} against {stages.decoder_folder(config)} ({stage.name})")
    print(f"# {describe_batches(config, ranks, asked)}")
    print("# DeepSpeed: " + json.dumps(ds_config(config, ranks)))
