"""The steps of `zero-ds quickstart`: the whole method, and its controls, on the 135M model of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zero_ds.cluster.pipeline import Command, Step, zero_ds_command
from zero_ds.cluster.story import (
    PURPOSES,
    Outcome,
    outcome_of_evaluation,
    outcome_of_export,
    outcome_of_surrogate,
    outcome_of_training,
    outcome_of_trajectory,
)
from zero_ds.config.loading import load_run
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path

RECIPES = "smollm2-135m"

AGAINST_TARGET = ("decoder=target", "distill.logits=0", "distill.next_token=1")
"""Settings of a stage that trains against the full model, which has no translator to distil."""

FROM_TRAJECTORY = "trajectory"
"""Value of `replace` that takes the layers which the trajectory proposes."""


@dataclass(frozen=True)
class Quickstart:
    """Choices that decide the commands of the quickstart."""

    out: Path
    """Folder of the run."""
    demo: Path
    """Folder of `zero-ds demo`."""
    target: str
    """Folder of the language model."""
    replace: str = "24:28"
    """Layers to replace, `first:last` or `trajectory`."""
    scale: float = 1.0
    """Factor on the training steps of every stage."""
    seed: int = 0
    translators: int = 1
    """Number of translators in place of the replaced layers."""
    images: int | None = None
    """Number of held-out images to evaluate on, from the first. None: all of them."""
    overrides: tuple[str, ...] = ()
    """Settings `key=value` of every training run."""

    def main_steps(self) -> list[Step]:
        """Returns the steps from trajectory to export, in the order of the method."""
        if self.replace != FROM_TRAJECTORY:
            self._check_range()
        encoder, export = self.out / "encoder", self.out / "export"
        return [
            self._trajectory(),
            self._surrogate("surrogate", 3, self._cut(), self.out / "surrogate"),
            self._training("translator", "translator", 82),
            self._training("pretrain", "pretrain", 68, starts=("translator",)),
            self._training("encoder", "encoder", 225, starts=("translator", "pretrain")),
            self.cost("full-cost", 4, AGAINST_TARGET),
            _step("graft", 2, zero_ds_command("graft", "--weights", str(encoder), "--target", self.target)),
            self._evaluations(
                "evaluation", {"surrogate": ("encoder", self.out / "surrogate"), "grafted": ("encoder", self.target)}
            ),
            _step(
                "export",
                25,
                zero_ds_command(
                    *("export", "--weights", str(encoder), "--target", self.target, "--out", str(export)),
                ),
                export / "proof.json",
                partial(outcome_of_export, export),
            ),
        ]

    def control_steps(self) -> list[Step]:
        """Returns the steps of the controls.

        They are an encoder trained against the full model, one trained against a surrogate that lacks early layers, and
        a full decoder trained from the grafted encoder (warm start) and from the untrained one (cold start).
        """
        full = "controls/full-adapter"
        early_surrogate = self.out / "controls/early-surrogate"
        return [
            self._training("full-adapter", "pretrain", 200, AGAINST_TARGET, into=full),
            self._training(
                "full-encoder", "encoder", 200, AGAINST_TARGET, starts=(full,), into="controls/full-encoder"
            ),
            self._surrogate("early-surrogate", 8, ("--replace", self._early_range()), early_surrogate),
            *self._early_stages(early_surrogate),
            self._evaluations(
                "controls-evaluation",
                {
                    "full": ("controls/full-encoder", self.target),
                    "early_surrogate": ("controls/early-encoder", early_surrogate),
                    "early_grafted": ("controls/early-encoder", self.target),
                },
            ),
            self._training("warm-start", "decoder", 300, starts=("encoder",), into="controls/warm-start"),
            self._training("cold-start", "decoder", 300, starts=(), into="controls/cold-start"),
        ]

    def report_step(self, controls: bool) -> Step:
        """Returns the step that puts all results on one page."""
        options = ("--controls",) if controls else ()
        command = zero_ds_command("report", "--run", str(self.out), *options)
        return _step("report-controls" if controls else "report", 6, command, self.out / "report.html")

    def cost(self, name: str, steps: int, overrides: tuple[str, ...] = ()) -> Step:
        """Returns a step that trains the encoder stage for a few optimizer steps, only to measure their duration."""
        starts = ("translator", "pretrain")
        return self._training(name, "encoder", 16 + 2 * steps, overrides, starts=starts, steps=steps)

    # -- single steps --------------------------------------------------------------------------------------------------

    def _trajectory(self) -> Step:
        out = self.out / "trajectory"
        command = zero_ds_command(
            *("trajectory", "--model", self.target, "--data", str(self.demo / "data/trajectory.json")),
            *("--samples", "32", "--out", str(out)),
        )
        return _step("trajectory", 18, command, out / "trajectory.json", partial(outcome_of_trajectory, out))

    def _cut(self) -> tuple[str, ...]:
        if self.replace == FROM_TRAJECTORY:
            return ("--from-trajectory", str(self.out / "trajectory"))
        return ("--replace", self.replace)

    def _surrogate(self, name: str, seconds: float, cut: tuple[str, ...], out: Path) -> Step:
        command = zero_ds_command(
            *("surrogate", "--target", self.target, *cut, "--translators", str(self.translators)),
            *("--out", str(out)),
        )
        return _step(name, seconds, command, out / "surrogate.json", partial(outcome_of_surrogate, out))

    def _training(
        self,
        name: str,
        recipe: str,
        seconds: float,
        overrides: tuple[str, ...] = (),
        *,
        starts: tuple[str, ...] = (),
        into: str | None = None,
        steps: int | None = None,
    ) -> Step:
        """Returns a training step.

        seconds: its expected duration at scale 1; starts: folders of the earlier results that it starts from; into: its
        folder, else `name`; steps: optimizer steps, else the recipe's number times `scale`.

        Raises:
            ConfigError: an override cannot be used.
        """
        run = load_run(f"{RECIPES}/{recipe}", [*self.overrides, *overrides])
        if steps is None:
            assert run.max_steps is not None
            steps = max(1, round(run.max_steps * self.scale))
            seconds *= self.scale
        out = self.out / (into or name)
        command = (
            "bash",
            "launch/train.sh",
            f"{RECIPES}/{recipe}",
            f"out={out}",
            f"surrogate={self.out / 'surrogate'}",
            f"init_from=[{', '.join(str(self.out / start) for start in starts)}]",
            f"max_steps={steps}",
            f"seed={self.seed}",
            *self.overrides,
            *overrides,
        )
        return _step(name, seconds, command, out / "latest", partial(outcome_of_training, out))

    def _early_stages(self, surrogate: Path) -> list[Step]:
        """Returns the training stages against the surrogate that lacks early layers, each starting from all before."""
        steps: list[Step] = []
        starts: tuple[str, ...] = ()
        for stage in ("translator", "pretrain", "encoder"):
            name = f"early-{stage}"
            into = f"controls/{name}"
            steps.append(self._training(name, stage, 150, (f"surrogate={surrogate}",), starts=starts, into=into))
            starts = (*starts, into)
        return steps

    def _evaluations(self, name: str, models: Mapping[str, tuple[str, object]]) -> Step:
        """Returns a step that evaluates several models at the same time.

        models: label of each result -> folder of the weights inside of the run, and the decoder that they join.
        """
        records = str(self.demo / "data/heldout.json")
        options = () if self.images is None else ("--pictures", str(self.images))
        commands: list[Command] = []
        results: dict[str, Path] = {}
        for label, (weights, decoder) in models.items():
            result = self.out / f"evaluation/{label}.json"
            commands.append(
                zero_ds_command(
                    *("eval", "records", "--weights", str(self.out / weights), "--decoder", str(decoder)),
                    *("--records", records, "--out", str(result), *options),
                )
            )
            results[label] = result
        seconds, outcome = 60.0 * len(models), partial(outcome_of_evaluation, results)
        return Step(
            name, tuple(commands), seconds, tuple(results.values()), purpose=PURPOSES.get(name, ""), outcome=outcome
        )

    # -- ranges of layers ----------------------------------------------------------------------------------------------

    def _check_range(self) -> None:
        """Raises ConfigError now, before the first step, if the model has no such layers."""
        from zero_ds.model.decoders.folder import DecoderFolder
        from zero_ds.model.layer_plan import LayerPlan, Replaced

        replaced = Replaced.parse(self.replace, self.translators)
        folder = home_path(self.target)
        if folder.is_dir():  # else the first step says that it is missing
            LayerPlan(DecoderFolder(folder).depth, (replaced,))

    def _early_range(self) -> str:
        """Returns as many layers as the surrogate replaces, from layer 1 on: the paper's T(1,11) next to T(16,26).

        Raises:
            ConfigError: the trajectory chooses the layers, and the surrogate is not built yet.
        """
        from zero_ds.model.layer_plan import Replaced, read_surrogate

        if self.replace != FROM_TRAJECTORY:
            ranges = [Replaced.parse(self.replace)]
        elif (self.out / "surrogate/surrogate.json").is_file():
            ranges = list(read_surrogate(self.out / "surrogate").plan.replaced)
        else:
            raise ConfigError("run the quickstart once without --controls, or name the layers with --replace.")
        return f"1:{sum(replaced.last - replaced.first + 1 for replaced in ranges)}"


def _step(
    name: str, seconds: float, command: Command, produces: Path | None = None, outcome: Outcome | None = None
) -> Step:
    files = () if produces is None else (produces,)
    return Step(name, (command,), seconds, files, purpose=PURPOSES.get(name, ""), outcome=outcome)
