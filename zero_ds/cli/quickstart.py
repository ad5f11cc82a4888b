"""`zero-ds quickstart`: the whole method on the embedded default, as a chain of public commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.demo import LLM
from zero_ds.cluster.pipeline import Pipeline, Step, start_fresh
from zero_ds.config.loading import load_run
from zero_ds.runtime.errors import ConfigError

FAMILY = "smollm2-135m"
FULL = ("decoder=target", "distill.logits=0", "distill.next_token=1")
"""Overrides of a stage that trains against the full model, where there is no translator to distil."""


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    demo: Annotated[Path, typer.Option(help="Folder of `zero-ds demo`.")] = Path("runs/demo"),
    steps_scale: Annotated[float, typer.Option(help="Multiplies the training steps of every stage.", min=0.001)] = 1.0,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also train and evaluate the controls (see docs/method.md).")
    ] = False,
    replace: Annotated[
        str, typer.Option(help="Layers to replace, first:last; or `trajectory`: those that the trajectory proposes.")
    ] = "24:28",
    translators: Annotated[int, typer.Option(help="Translators that take the place of the layers.", min=1)] = 1,
    pictures: Annotated[int, typer.Option(help="Held-out pictures to evaluate on, of 500.", min=2)] = 250,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and sample order.", min=0)] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for every training run, e.g. zero=zero2; repeatable.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove an earlier run in --out first.")] = False,
) -> None:
    """The whole method on a 135M model, trajectory to report; steps that are finished are skipped."""
    if fresh:
        start_fresh(out)
    if not (demo / "data/train.json").is_file():
        raise ConfigError(f"{demo} holds no demo data; make them with: zero-ds demo --out {demo}")
    plan = Plan(out, demo, steps_scale, seed, replace, translators, pictures, tuple(overrides or ()))
    steps = plan.main() + (plan.controls() if controls else [])
    steps.append(plan.report(controls))
    Pipeline(out, steps).run()
    print(f"\n{(out / 'report.md').read_text(encoding='utf-8').split('## ')[0].strip()}\n")
    print(f"Report: {out / 'report.html'}   TensorBoard: launch/tensorboard.sh {out}   Model: {out / 'export'}")


class Plan:
    """The commands of the quickstart, by name."""

    def __init__(
        self,
        out: Path,
        demo: Path,
        scale: float,
        seed: int,
        replace: str,
        translators: int = 1,
        pictures: int | None = None,
        overrides: tuple[str, ...] = (),
    ) -> None:
        """pictures: evaluate on the first n held-out pictures only; overrides: of every training run."""
        self.out, self.demo, self.scale, self.seed = out, demo, scale, seed
        self.replace, self.translators = replace, str(translators)
        self.overrides = overrides
        self.pictures = () if pictures is None else ("--pictures", str(pictures))
        self.target = str(LLM)

    def main(self) -> list[Step]:
        """Trajectory to export, in the order of the method."""
        out, cut = self.out, ("--replace", self.replace)
        if self.replace == "trajectory":
            cut = ("--from-trajectory", str(out / "trajectory"))
        else:
            self._check_range()
        return [
            self._ours(
                "trajectory",
                18,
                ("trajectory", "--model", self.target, "--data", str(self.demo / "data/trajectory.json")),
                ("--samples", "32", "--out", str(out / "trajectory")),
                produces="trajectory/trajectory.json",
            ),
            self._ours(
                "surrogate",
                3,
                ("surrogate", "--target", self.target, *cut, "--translators", self.translators),
                ("--out", str(out / "surrogate")),
                produces="surrogate/surrogate.json",
            ),
            self._train("translator", "translator", 82),
            self._train("pretrain", "pretrain", 68, starts=("translator",)),
            self._train("encoder", "encoder", 225, starts=("translator", "pretrain")),
            self.cost("full-cost", 4, FULL),
            self._ours("graft", 2, ("graft", "--weights", str(out / "encoder"), "--target", self.target)),
            self._evaluations(
                "evaluation", {"surrogate": ("encoder", out / "surrogate"), "grafted": ("encoder", self.target)}
            ),
            self._ours(
                "export",
                25,
                ("export", "--weights", str(out / "encoder"), "--target", self.target, "--out", str(out / "export")),
                produces="export/proof.json",
            ),
        ]

    def controls(self) -> list[Step]:
        """Encoder trained on the full model; on a surrogate without early layers; warm start against cold start."""
        out = self.out
        early = self._early_range()
        return [
            self._train("full-adapter", "pretrain", 200, FULL, into="controls/full-adapter"),
            self._train(
                "full-encoder", "encoder", 200, FULL, starts=("controls/full-adapter",), into="controls/full-encoder"
            ),
            self._ours(
                "early-surrogate",
                8,
                ("surrogate", "--target", self.target, "--replace", early, "--translators", self.translators),
                ("--out", str(out / "controls/early-surrogate")),
                produces="controls/early-surrogate/surrogate.json",
            ),
            *self._early_stages(),
            self._evaluations(
                "controls-evaluation",
                {
                    "full": ("controls/full-encoder", self.target),
                    "early_surrogate": ("controls/early-encoder", out / "controls/early-surrogate"),
                    "early_grafted": ("controls/early-encoder", self.target),
                },
            ),
            self._train("warm-start", "decoder", 300, starts=("encoder",), into="controls/warm-start"),
            self._train("cold-start", "decoder", 300, starts=(), into="controls/cold-start"),
        ]

    def cost(self, name: str, steps: int, overrides: tuple[str, ...] = ()) -> Step:
        """A few steps of the encoder stage, for their time alone."""
        return self._train(name, "encoder", 16 + 2 * steps, overrides, starts=("translator", "pretrain"), steps=steps)

    def report(self, controls: bool) -> Step:
        """Everything above on one page."""
        command = ["report", "--run", str(self.out)]
        if controls:
            command.append("--controls")
        return self._ours("report-controls" if controls else "report", 6, tuple(command), produces="report.html")

    def _check_range(self) -> None:
        """A range that the model has not ends the command before its first step."""
        from zero_ds.model.decoders.folder import depth_of
        from zero_ds.model.layer_plan import LayerPlan, Replaced

        part = Replaced.parse(self.replace, int(self.translators))
        if (folder := Path(self.target).expanduser()).is_dir():  # if not, the first step says so
            LayerPlan(depth_of(folder), (part,))

    def _early_stages(self) -> list[Step]:
        surrogate = (f"surrogate={self.out / 'controls/early-surrogate'}",)
        steps: list[Step] = []
        starts: tuple[str, ...] = ()
        for stage in ("translator", "pretrain", "encoder"):
            into = f"controls/early-{stage}"
            steps.append(self._train(f"early-{stage}", stage, 150, surrogate, starts=starts, into=into))
            starts = (*starts, into)
        return steps

    def _early_range(self) -> str:
        """As many layers as the surrogate replaces, counted from layer 1, like T(1,11) beside T(16,26) in the paper."""
        from zero_ds.model.layer_plan import Replaced, read_surrogate

        if self.replace != "trajectory":
            parts = [Replaced.parse(self.replace)]
        elif (self.out / "surrogate/surrogate.json").is_file():
            parts = list(read_surrogate(self.out / "surrogate").plan.replaced)
        else:
            raise ConfigError("run the quickstart once without --controls, or name the layers with --replace.")
        return f"1:{sum(part.last - part.first + 1 for part in parts)}"

    def _train(
        self,
        name: str,
        recipe: str,
        seconds: float,
        overrides: tuple[str, ...] = (),
        starts: tuple[str, ...] = (),
        into: str | None = None,
        steps: int | None = None,
    ) -> Step:
        folder = into or name
        settings = load_run(f"{FAMILY}/{recipe}", [*self.overrides, *overrides])  # what is wrong ends it here
        if steps is None:
            assert settings.max_steps is not None
            steps, seconds = max(1, round(settings.max_steps * self.scale)), seconds * self.scale
        command = (
            "bash",
            "launch/train.sh",
            f"{FAMILY}/{recipe}",
            f"out={self.out / folder}",
            f"surrogate={self.out / 'surrogate'}",
            f"init_from=[{', '.join(str(self.out / start) for start in starts)}]",
            f"max_steps={steps}",
            f"seed={self.seed}",
            *self.overrides,
            *overrides,
        )
        return Step(name, (command,), seconds, (self.out / folder / "latest",))

    def _evaluations(self, name: str, of: dict[str, tuple[str, object]]) -> Step:
        commands = tuple(
            self._command(
                ("eval", "records", "--weights", str(self.out / weights), "--decoder", str(decoder)),
                (
                    "--records",
                    str(self.demo / "data/heldout.json"),
                    "--out",
                    str(self.out / f"evaluation/{label}.json"),
                    *self.pictures,
                ),
            )
            for label, (weights, decoder) in of.items()
        )
        return Step(name, commands, 60.0 * len(of), tuple(self.out / f"evaluation/{label}.json" for label in of))

    def _ours(self, name: str, seconds: float, *words: tuple[str, ...], produces: str | None = None) -> Step:
        files = (self.out / produces,) if produces else ()
        return Step(name, (self._command(*words),), seconds, files)

    def _command(self, *words: tuple[str, ...]) -> tuple[str, ...]:
        return (sys.executable, "-m", "zero_ds.cli", *(word for group in words for word in group))
