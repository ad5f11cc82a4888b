"""Starts two jobs on one run folder and kills them at random: no checkpoint is ever damaged, and the end is the same.

    python tools/two_jobs.py --kills 20

Both jobs train the same tiny recipe on two ranks, each of which writes its share of the checkpoints beside training.
One job has the folder, the other is refused. Again and again a rank, all ranks or the launcher of the job at work is
killed, half of the time while it saves, and both jobs are started again at once, so that they meet over the lock that
was left. After each kill, every published checkpoint is read and compared with its hashes. At the end one job finishes,
and its weights and state are compared, bit for bit, with those of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import random_faults
import typer
from random_faults import ROOT, Job, Story, make_recipe, undisturbed, write_recipe

from zero_ds.training.checkpoint.checkpoint import FOLDER_NAME, Checkpoint, CheckpointError, check_hash, find_checkpoint

TRAINING = 2.0
"""Seconds of training for each kill, at an undisturbed pace and without the saves, which take several times as long."""
WAIT = 300.0
"""Seconds within which a job has to make a step after a kill."""


def damaged(run: Path) -> list[str]:
    """Returns what is wrong with the published checkpoints of a run folder, which a job may be using."""
    problems = []
    if (run / "latest").is_file() and not (run / (run / "latest").read_text().strip() / "manifest.json").is_file():
        problems.append("latest names no checkpoint")
    for folder in sorted(run.glob("step-*")):
        if not FOLDER_NAME.fullmatch(folder.name):
            continue
        try:
            check(find_checkpoint(folder))
        except (CheckpointError, OSError) as error:
            if folder.is_dir():  # otherwise a newer one has taken its place in the meantime
                problems.append(str(error))
    return problems


def check(checkpoint: Checkpoint) -> None:
    """Compares every file of a checkpoint with its hash.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    checkpoint.check_weights()
    for path, expected in checkpoint.state_files().items():
        check_hash(path, expected)


def kill(job: Job, chance: random.Random) -> str:
    """Kills a part of a job; returns what."""
    ranks = job.ranks()
    victims = {
        "rank 0": [ranks[0]] if 0 in ranks else [],
        "rank 1": [ranks[1]] if 1 in ranks else [],
        "all ranks": list(ranks.values()),
        "the launcher": job.deepspeed(),
    }
    name = chance.choice([name for name, processes in victims.items() if processes])
    random_faults._signal(victims[name], signal.SIGKILL)
    return name


def wait_for_instant(jobs: list[Job], chance: random.Random, steps: int) -> Job | None:
    """Waits until a job has made a step and then for a random instant, or until it saves; returns the job at work."""
    run, since = jobs[0].run, jobs[0].step()
    deadline = time.monotonic() + WAIT
    while jobs[0].step() <= since and time.monotonic() < deadline:
        if jobs[0].finished(steps):
            return None
        for job in jobs:
            if job.status() is not None:
                job.start()
        time.sleep(0.5)
    if chance.random() < 0.5:
        until = time.monotonic() + 20
        while not list(run.glob(".step-*.tmp")) and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.02))
    else:
        time.sleep(chance.uniform(0.0, 3.0))
    return next((job for job in jobs if job.ranks()), None)


def fight(jobs: list[Job], chance: random.Random, kills: int, steps: int, story: Story) -> None:
    """Starts and kills the jobs, and lets one of them finish in the end."""
    try:
        for number in range(kills):
            for job in jobs:
                if job.status() is not None or job.process is None:
                    job.start()
            job_at_work = wait_for_instant(jobs, chance, steps)
            if jobs[0].finished(steps):
                break
            if job_at_work is None:  # it ended by itself
                continue
            try:
                what = kill(job_at_work, chance)
            except IndexError:  # it ended by itself
                continue
            story.faults[what] += 1
            found = damaged(jobs[0].run)
            story.problems += found
            story.say(
                f"kill {number + 1}, step {jobs[0].step()}: {what}; {'; '.join(found) or 'all checkpoints whole'}"
            )
        deadline = time.monotonic() + 4 * WAIT
        while not jobs[0].finished(steps) and time.monotonic() < deadline:
            for job in jobs:
                if job.status() is not None or job.process is None:
                    job.start()
            time.sleep(1.0)
        if not jobs[0].finished(steps):
            story.problems.append("the jobs do not get on")
        for job in jobs:
            if job.process is not None:
                job.process.wait(timeout=WAIT)
    finally:
        for job in jobs:
            random_faults._signal(job.processes(), signal.SIGKILL)


def compare(run: Path, expected: Path, story: Story) -> None:
    """Compares the end with the undisturbed run, and adds differences to the problems."""
    name = (expected / "latest").read_text().strip()
    story.problems += damaged(run)
    for path in sorted((expected / name).rglob("*.safetensors")):
        ours = run / path.relative_to(expected)
        if not ours.is_file() or ours.read_bytes() != path.read_bytes():
            story.problems.append(f"{path.relative_to(expected)} differs from that of the undisturbed run")
    left = [path.name for path in run.iterdir() if path.name.startswith(".") or path.name == "lock.json"]
    story.problems += [f"left: {', '.join(left)}"] if left else []


def main(
    kills: Annotated[int, typer.Option(help="Number of kills.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the kills.")] = 0,
    zero: Annotated[str, typer.Option(help="DeepSpeed config.")] = "zero2",
    asynchronous: Annotated[bool, typer.Option(help="Whether to write beside training.")] = True,
    work: Annotated[
        Path | None, typer.Option(help="New folder for everything; kept (default: a temporary one).")
    ] = None,
) -> None:
    """Kill two jobs on one run folder at random, and look for damaged checkpoints."""
    folder = work or Path(tempfile.mkdtemp(prefix="two-jobs-"))
    (folder / "tmp").mkdir(parents=True)
    usual = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    usual |= {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT), "ZERO_DS_SILENCE": str(random_faults.SILENCE)}
    usual["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings, story, chance = make_recipe(folder), Story(), random.Random(seed)
    settings["checkpoint"] = {"every_steps": 2, "keep": 2, "writers": 2, "asynchronous": asynchronous}
    probe = Job(folder, "probe", folder, usual, restarts=0)
    write_recipe(probe, settings, 20, zero)
    steps = max(15 * kills, round(TRAINING * kills / undisturbed(probe)))
    reference = Job(folder, "undisturbed", folder, usual, restarts=0)
    write_recipe(reference, settings, steps, zero)
    undisturbed(reference)
    jobs = [Job(folder, name, folder, usual, restarts=0) for name in ("first", "second")]
    for job in jobs:
        job.run = folder / "shared"
        write_recipe(job, settings, steps, zero)
    fight(jobs, chance, kills, steps, story)
    compare(jobs[0].run, reference.run, story)
    refused = Counter(
        "is in use by" in line for job in jobs for line in job.log.read_text(errors="replace").splitlines()
    )
    story.say(f"{sum(story.faults.values())} kills ({dict(story.faults)}), {refused[True]} refusals of the second job")
    story.end(None if work else folder)


if __name__ == "__main__":
    typer.run(main)
