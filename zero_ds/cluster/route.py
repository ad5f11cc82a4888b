"""The steps of `zero-ds pipeline`: trajectory, surrogate, training stages and export for a model of the recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zero_ds.cluster.pipeline import Step, zero_ds_command
from zero_ds.cluster.story import (
    PURPOSES,
    outcome_of_export,
    outcome_of_surrogate,
    outcome_of_training,
    outcome_of_trajectory,
)
from zero_ds.config.loading import load_run, recipe_names
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError, did_you_mean

CHECKPOINT_SECONDS = 900.0
"""Seconds that ranks on many machines get, once asked to stop, to finish their step and write a checkpoint."""

SET_BY_PIPELINE = ("out", "surrogate", "init_from", "continue_from")
"""Settings of a run that the pipeline chooses itself."""

FROM_TRAJECTORY = "trajectory"
"""Value of --replace that takes the layers which the trajectory proposes."""


@dataclass(frozen=True)
class Route:
    """Choices that decide the steps for one model."""

    model: str
    """Name of the model's folder of recipes, such as llama-3.1-8b, or path of a folder of one's own recipes."""
    out: Path
    """Folder of all results."""
    overrides: tuple[str, ...] = ()
    """Settings `key=value` of every training stage."""
    launch_options: tuple[str, ...] = ()
    """Options of launch/train.sh for every training stage."""
    replace: str | None = None
    """Layers to replace, `first:last` or `trajectory`. None: the layers that the recipes' surrogate is named after."""
    texts: Path | None = None
    """Texts for the trajectory. None: the first data source of the first stage."""
    samples: int = 300
    """Number of texts that the trajectory reads."""

    def steps(self) -> list[Step]:
        """Returns the steps in the order in which they run.

        Raises:
            ConfigError: the model has no recipes, a setting that the pipeline chooses itself is overridden,
                no texts are named for the trajectory, or `replace` is not a range of layers.
        """
        for override in self.overrides:
            key = override.partition("=")[0]
            if key in SET_BY_PIPELINE:
                raise ConfigError(f"the pipeline sets {key} itself; choose the folder of all results with --out.")
        runs = training_runs(self.model, self.overrides)
        if any(run.trust_remote_code for run in runs.values()):
            raise ConfigError(
                "the pipeline ends with an export, which cannot take along a model's own code (trust_remote_code); "
                "give the commands one by one."
            )
        layers = self._layers(runs)
        surrogate = self.out / ("surrogate" if layers == FROM_TRAJECTORY else f"T{layers.replace(':', '-')}")
        target = next(iter(runs.values())).target
        return [
            self._trajectory_step(next(iter(runs.values()))),
            self._surrogate_step(target, layers, surrogate),
            *(self._training_step(name, runs, surrogate) for name in runs),
            self._export_step(target, list(runs)[-1], list(runs.values())[-1].precision),
        ]

    def _layers(self, runs: dict[str, RunConfig]) -> str:
        """Returns the layers to replace, as `first:last` or `trajectory`."""
        if self.replace:
            if self.replace != FROM_TRAJECTORY:
                from zero_ds.model.layer_plan import Replaced

                Replaced.parse(self.replace)  # raises ConfigError now instead of hours later
            return self.replace
        surrogate = next(run.surrogate for run in runs.values() if run.surrogate)
        return _layers_in_name(surrogate) or FROM_TRAJECTORY

    def _trajectory_step(self, first: RunConfig) -> Step:
        if self.texts is None and not first.data.sources:
            raise ConfigError("the first stage names no data; say which texts the trajectory reads: --texts FILE.")
        texts = str(self.texts or first.data.sources[0].path)
        out = self.out / "trajectory"
        command = zero_ds_command(
            *("trajectory", "--model", first.target, "--data", texts),
            *("--samples", str(self.samples), "--out", str(out)),
        )
        return Step(
            "trajectory",
            (command,),
            60.0,
            (out / "trajectory.json",),
            purpose=PURPOSES["trajectory"],
            outcome=partial(outcome_of_trajectory, out),
        )

    def _surrogate_step(self, target: str, layers: str, surrogate: Path) -> Step:
        if layers == FROM_TRAJECTORY:
            cut = ("--from-trajectory", str(self.out / "trajectory"))
        else:
            cut = ("--replace", layers)
        command = zero_ds_command("surrogate", "--target", target, *cut, "--out", str(surrogate))
        return Step(
            "surrogate",
            (command,),
            60.0,
            (surrogate / "surrogate.json",),
            purpose=PURPOSES["surrogate"],
            outcome=partial(outcome_of_surrogate, surrogate),
        )

    def _training_step(self, name: str, runs: dict[str, RunConfig], surrogate: Path) -> Step:
        run = runs[name]
        stage_of_out = {other.out: stage for stage, other in runs.items()}
        starts = ", ".join(str(self.out / stage_of_out.get(start, start)) for start in run.init_from)
        settings = [f"out={self.out / name}", f"init_from=[{starts}]", *self.overrides]
        if run.surrogate:
            settings.append(f"surrogate={surrogate}")
        command = ("bash", "launch/train.sh", stage_recipes(self.model)[name], *settings)
        return Step(
            name,
            ((*command, *self.launch_options),),
            600.0,
            (self.out / name / "latest",),
            same=(command,),  # the same run may go on with other machines
            patience=CHECKPOINT_SECONDS if "--hostfile" in self.launch_options else None,
            purpose=PURPOSES.get(name, ""),
            outcome=partial(outcome_of_training, self.out / name),
        )

    def _export_step(self, target: str, last_stage: str, precision: str) -> Step:
        out = self.out / "export"
        command = zero_ds_command(
            *("export", "--weights", str(self.out / last_stage), "--target", target, "--out", str(out)),
            *("--dtype", "bfloat16" if precision == "bf16" else "float32"),
        )
        return Step(
            "export",
            (command,),
            60.0,
            (out / "proof.json",),
            purpose=PURPOSES["export"],
            outcome=partial(outcome_of_export, out),
        )


def training_runs(model: str, overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """Returns the training stages that lead to a model's `decoder` stage, by the name of their recipe.

    Every stage comes after the stages whose results it starts from.

    Raises:
        ConfigError: the model has no recipes.
    """
    recipes = stage_recipes(model)
    if "decoder" not in recipes:
        raise ConfigError(f"{model} has no recipe `decoder`, the last stage, from which the others are found.")
    stage_of_out = {load_run(recipe).out: stage for stage, recipe in recipes.items()}
    runs: dict[str, RunConfig] = {}

    def add(stage: str) -> None:
        run = load_run(recipes[stage], list(overrides))
        for start in run.init_from:
            earlier = stage_of_out.get(start)
            if earlier is not None and earlier not in runs:
                add(earlier)
        runs[stage] = run

    add("decoder")
    return runs


def stage_recipes(model: str) -> dict[str, str]:
    """Returns the recipes of a model by their stage's name: those of the package, or the YAML files of a folder.

    Raises:
        ConfigError: the model has no recipes.
    """
    names = [name for name in recipe_names() if name.startswith(f"{model}/")]
    if names:
        return {name.partition("/")[2]: name for name in names}
    files = [path for path in sorted(Path(model).glob("*.yaml")) if path.stem != "common"]
    if not files:
        models = sorted({name.partition("/")[0] for name in recipe_names()})
        raise ConfigError(f"no recipes exist for model '{model}'{did_you_mean(model, models)}")
    return {path.stem: str(path) for path in files}


def _layers_in_name(surrogate: str) -> str | None:
    """Returns `17:30` for a folder T17-30, as recipes name their surrogates; None for any other name."""
    found = re.fullmatch(r"T(\d+)-(\d+)", Path(surrogate).name)
    return f"{found[1]}:{found[2]}" if found else None
