"""Trains a tiny model on two ranks under random faults, and compares its end, bit for bit, with an undisturbed run.

    python tools/random_faults.py --minutes 30

Faults: a rank, all ranks or DeepSpeed's launcher killed; a rank or the whole job suspended, for longer or shorter than
ranks are patient; a full disk; a network that loses everything; a rank that gets a fraction of its time; a clock that
jumps. Small disk and network belong to a namespace of this tool's own (`unshare`); where that is not allowed, the disk
is a limit on the size of files, and the network stays. The clock is a library preloaded into the ranks, for which a C
compiler is needed. Prints every fault with what came of it, then what must hold:

    the same bytes     weights and resume state of the last checkpoint are those of the undisturbed run
    every reason       each attempt that failed has its reason in the run folder
    nothing left       no process, no lock, no temporary file or folder, neither in the run folder nor in TMPDIR
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from zero_ds.runtime import failure, lock  # noqa: E402

INSIDE = "RANDOM_FAULTS_INSIDE"
"""Variable that is set in the tool's own namespace."""
MARK = "RANDOM_FAULTS_MARK"
"""Variable that marks all processes of the job, whoever their parent is."""
SILENCE = 15
"""Seconds without a sign of life after which ranks count as dead here."""
DISK_MB = 24
"""Size of the small disk: some checkpoints of the tiny model."""
PATIENCE = 300.0
"""Seconds without a new step, after the last fault, after which the run counts as hanging."""

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *jump;
static long seconds(void) {
  if (!jump) {
    int file = open(getenv("RANDOM_FAULTS_CLOCK"), O_RDONLY);
    jump = file < 0 ? 0 : mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
  }
  return jump ? *jump : 0;
}
int clock_gettime(clockid_t id, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(id, at);
  if (!status && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += seconds();
  return status;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""
"""Library that shifts the time of day of the processes into which it is loaded."""


class Clock:
    """Time of day of the job, which can be set to jump."""

    def __init__(self, work: Path) -> None:
        self.library, self.shift = work / "clock.so", work / "clock"
        self.shift.write_bytes(struct.pack("l", 0))
        source = work / "clock.c"
        source.write_text(CLOCK)
        compiler = shutil.which("cc") or shutil.which("gcc")
        command = [compiler or "cc", "-shared", "-fPIC", "-O1", "-o", str(self.library), str(source), "-ldl"]
        self.works = compiler is not None and not subprocess.run(command, capture_output=True).returncode

    def environment(self) -> dict[str, str]:
        """Returns the variables that load the library."""
        if not self.works:
            return {}
        return {"LD_PRELOAD": str(self.library), "RANDOM_FAULTS_CLOCK": str(self.shift)}

    def jump(self, seconds: int) -> None:
        """Shifts the time of day from now on."""
        with self.shift.open("r+b") as file, mmap.mmap(file.fileno(), 8) as memory:
            memory[:8] = struct.pack("l", seconds)


class Job:
    """One run folder with the launcher that trains into it, started again by the tool as a person would."""

    def __init__(self, work: Path, name: str, disk: Path, environment: dict[str, str], restarts: int) -> None:
        self.run, self.log, self.recipe = disk / name, work / f"{name}.log", work / f"{name}.yaml"
        self.mark, self.disk = f"{name}-{os.getpid()}", disk
        self.environment = {**os.environ, **environment, MARK: self.mark}
        self.command = [str(ROOT / "launch" / "train.sh"), str(self.recipe), "--ranks", "2"]
        self.command += ["--max-restarts", str(restarts)]
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=file, env=self.environment, start_new_session=True
            )

    def status(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def processes(self) -> list[psutil.Process]:
        """Returns every process of the job that is alive."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Returns the rank processes, without the workers that they start."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                local = [word for word in words if word.startswith("--local_rank=")]
                if local and "zero_ds.train" in words:
                    found[int(local[0].split("=")[1])] = process
        return found

    def deepspeed(self) -> list[psutil.Process]:
        """Returns the processes of DeepSpeed's launcher."""
        with_words = [(process, _words(process)) for process in self.processes()]
        return [
            process for process, words in with_words if "deepspeed.launcher" in words and "zero_ds.clus" not in words
        ]

    def step(self) -> int:
        """Returns the number of the last step on record."""
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            return int(json.loads((self.run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    def finished(self, steps: int) -> bool:
        """Returns whether the last checkpoint is that of the last step."""
        with contextlib.suppress(OSError):
            return (self.run / "latest").read_text().strip() == f"step-{steps:06d}"
        return False


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Faults:
    """The faults, each of which returns a description of its effect."""

    def __init__(self, job: Job, chance: random.Random, clock: Clock, own_namespace: bool) -> None:
        self.job, self.chance, self.clock, self.own = job, chance, clock, own_namespace
        kinds: dict[str, tuple[Callable[[], str], bool]] = {
            "kill": (self.kill, True),
            "suspend a rank": (self.suspend_a_rank, True),
            "suspend the job": (self.suspend_the_job, True),
            "full disk": (self.full_disk, True),
            "lost network": (self.lost_network, own_namespace),
            "slow rank": (self.slow_rank, True),
            "clock jump": (self.clock_jump, clock.works),
        }
        self.kinds = {name: fault for name, (fault, possible) in kinds.items() if possible}
        self.impossible = [name for name, (_, possible) in kinds.items() if not possible]

    def kill(self) -> str:
        ranks = self.job.ranks()
        victims = {
            "rank 0": [ranks[0]] if 0 in ranks else [],
            "rank 1": [ranks[1]] if 1 in ranks else [],
            "all ranks": list(ranks.values()),
            "DeepSpeed's launcher": self.job.deepspeed(),
        }
        name = self.chance.choice(list(victims))
        _signal(victims[name], signal.SIGKILL)
        return f"{name} ({len(victims[name])} processes)"

    def suspend_a_rank(self) -> str:
        ranks = self.job.ranks()
        if not ranks:
            return "no rank there"
        rank = self.chance.choice(sorted(ranks))
        seconds = self.chance.choice([self.chance.uniform(1, SILENCE / 2), 2.0 * SILENCE])
        _signal([ranks[rank]], signal.SIGSTOP)
        time.sleep(seconds)
        _signal([ranks[rank]], signal.SIGCONT)
        return f"rank {rank} for {seconds:.0f} s"

    def suspend_the_job(self) -> str:
        seconds = self.chance.uniform(1.2, 2.0) * SILENCE
        stopped = self.job.processes()
        _signal(stopped, signal.SIGSTOP)
        time.sleep(seconds)
        _signal(stopped, signal.SIGCONT)
        return f"{len(stopped)} processes for {seconds:.0f} s"

    def full_disk(self) -> str:
        seconds = self.chance.uniform(2, 12)
        if self.own:
            filler = self.job.disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            time.sleep(seconds)
            filler.unlink()
            return f"for {seconds:.0f} s"
        limited = list(self.job.ranks().values())
        for process in limited:
            with contextlib.suppress(OSError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        time.sleep(seconds)
        for process in limited:
            with contextlib.suppress(OSError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return f"no file over 8 KB for {seconds:.0f} s"

    def lost_network(self) -> str:
        seconds = self.chance.choice([self.chance.uniform(1, SILENCE / 2), 2.5 * SILENCE])
        _ip("link", "set", "lo", "down")
        time.sleep(seconds)
        _ip("link", "set", "lo", "up")
        return f"for {seconds:.0f} s"

    def slow_rank(self) -> str:
        ranks = self.job.ranks()
        if not ranks:
            return "no rank there"
        rank, share, seconds = self.chance.choice(sorted(ranks)), self.chance.uniform(0.1, 0.4), 8.0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            _signal([ranks[rank]], signal.SIGSTOP)
            time.sleep(0.5 * (1 - share))
            _signal([ranks[rank]], signal.SIGCONT)
            time.sleep(0.5 * share)
        return f"rank {rank} at {share:.0%} for {seconds:.0f} s"

    def clock_jump(self) -> str:
        seconds = self.chance.choice([-86400, -3600, -60, 0, 60, 3600, 86400])
        self.clock.jump(seconds)
        return f"to {seconds:+d} s"

    def undo(self) -> None:
        """Removes the remains of an interrupted fault."""
        self.clock.jump(0)
        (self.job.disk / "filler").unlink(missing_ok=True)
        if self.own:
            _ip("link", "set", "lo", "up")


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            process.send_signal(number)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


# -- a run -------------------------------------------------------------------------------------------------------------


def make_recipe(work: Path) -> dict[str, Any]:
    """Builds tiny models and data, and returns the settings of a run on them."""
    import tiny

    from zero_ds.model.layer_plan import Replaced
    from zero_ds.surrogate.build import build_surrogate

    models = work / "models"
    tiny.llama(models / "target", tied=True)
    tiny.clip(models / "clip")
    build_surrogate(models / "target", [Replaced(1, 2), Replaced(3, 4)], models / "surrogate")
    data = tiny.write_data(work / "data", images=40, texts=8)
    return {
        "stage": "pretrain",
        "target": str(models / "target"),
        "surrogate": str(models / "surrogate"),
        "encoder": {"path": str(models / "clip")},
        "data": {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": ""},
        "optimizer": {"learning_rate": 1e-3},
        "global_batch": 4,
        "micro_batch": 1,
        "precision": "fp32",
        "activation_checkpointing": False,
        "checkpoint": {"every_steps": 5, "keep": 2},
    }


def write_recipe(job: Job, settings: dict[str, Any], steps: int, zero: str) -> None:
    from zero_ds.config.schema import RunConfig

    config = RunConfig.model_validate({**settings, "max_steps": steps, "zero": zero, "out": str(job.run)})
    job.recipe.write_text(config.dump())


def undisturbed(job: Job) -> float:
    """Runs a job to its end; returns the seconds of a step, as a median."""
    job.start()
    assert job.process is not None
    if job.process.wait():
        raise SystemExit(f"the undisturbed run failed:\n{job.log.read_text()[-3000:]}")
    seconds = sorted(json.loads(line)["seconds"] for line in (job.run / "metrics.jsonl").read_text().splitlines())
    return float(seconds[len(seconds) // 2])


class Story:
    """History of a run: its faults, starts by hand, and problems."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def end(self, folder: Path | None) -> NoReturn:
        """Prints the problems and ends the tool; removes `folder` if there was none."""
        for problem in self.problems:
            self.say(f"PROBLEM: {problem}")
        if folder is not None and not self.problems:
            shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(1 if self.problems else 0)


def disturbed(job: Job, faults: Faults, steps: int, until: float, story: Story) -> None:
    """Runs a job to its end under faults, which stop at the time `until`."""
    chance = faults.chance
    names: list[str] = []
    job.start()
    moved, last = time.monotonic(), 0
    due = time.monotonic() + chance.uniform(5, 15)
    while True:
        time.sleep(0.5)
        if job.step() != last:
            moved, last = time.monotonic(), job.step()
        status = job.status()
        if status == 0 and job.finished(steps):
            return
        if status is not None:
            reason = failure.read(job.run)
            story.say(f"the launcher ended with {status} at step {last}: {reason}")
            if not reason:
                story.problems.append(f"the launcher ended with {status} and left no reason")
            for process in job.processes():
                story.problems.append(f"the launcher left {process.pid}: {_words(process)[:100]}")
            faults.undo()
            job.start()
            moved = time.monotonic()
        if time.monotonic() < due and time.monotonic() < until and time.monotonic() - moved < PATIENCE:
            continue
        if time.monotonic() > until:
            if time.monotonic() - moved > PATIENCE:
                story.problems.append(f"the run hangs at step {last}")
                return
            faults.undo()
            continue
        names = names or chance.sample(list(faults.kinds), len(faults.kinds))
        name = names.pop()
        story.faults[name] += 1
        story.say(f"step {last}: {name}: {faults.kinds[name]()}")
        moved, due = time.monotonic(), time.monotonic() + chance.uniform(2, 25)


# -- what must hold ----------------------------------------------------------------------------------------------------


def compare(job: Job, expected: Path, steps: int, temporary: Path, story: Story) -> None:
    """Compares the end of a run with the undisturbed one, and adds differences to its problems."""
    for name in ("weights.safetensors", "resume/state.safetensors"):
        ours, theirs = (run / f"step-{steps:06d}" / name for run in (job.run, expected))
        if not ours.is_file() or ours.read_bytes() != theirs.read_bytes():
            story.problems.append(f"{name} differs from that of the undisturbed run")
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (job.run, expected)
    ]
    if losses[0] != losses[1]:
        story.problems.append("metrics.jsonl has other losses than the undisturbed run")
    said = job.log.read_text(errors="replace").splitlines()
    failed = [line.split("the run failed: ", 1)[1] for line in said if line.startswith("zero-ds: the run failed: ")]
    recorded = [line.split(" ", 1)[1] for line in failure.earlier(job.run)][::-1]
    if recorded != failed:
        story.problems.append(f"of {len(failed)} attempts that failed, {len(recorded)} reasons are on record")
    restarts = sum("from the last checkpoint" in line for line in said)
    if restarts + job.starts - 1 != len(failed):
        story.problems.append(f"{restarts} restarts and {job.starts} starts, but {len(failed)} failures")
    story.say(f"{restarts} restarts, {job.starts - 1} more starts by hand")
    for reason, count in Counter(failed).most_common():
        story.say(f"  {count} x {reason[:150]}")
    for process in job.processes():
        story.problems.append(f"left: process {process.pid}: {_words(process)[:100]}")
    left = [path.name for path in job.run.iterdir() if path.name.startswith(".") or path.name == lock.FILE]
    left += [f"{temporary.name}/{path.name}" for path in temporary.iterdir()]
    if left:
        story.problems.append(f"left: {', '.join(sorted(left)[:10])}")


def in_own_namespace() -> bool:
    """Returns whether this process has a network and mounts of its own; if it may, it starts again with them."""
    if os.environ.get(INSIDE):
        return True
    words = ["unshare", "--user", "--net", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    if subprocess.run([*words, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        return False
    os.environ[INSIDE] = "1"
    os.execvp(words[0], [*words, sys.executable, *sys.argv])
    return False


def main(
    minutes: Annotated[float, typer.Option(help="Time for which faults come.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 0,
    zero: Annotated[str, typer.Option(help="DeepSpeed config.")] = "zero2",
    only: Annotated[list[str] | None, typer.Option(help="Faults to choose from (default: all).")] = None,
    work: Annotated[
        Path | None, typer.Option(help="New folder for everything; kept (default: a temporary one).")
    ] = None,
) -> None:
    """Train under random faults, and compare the end with an undisturbed run."""
    own = in_own_namespace()
    if own:
        _ip("link", "set", "lo", "up")
    folder = work or Path(tempfile.mkdtemp(prefix="random-faults-"))
    (folder / "tmp").mkdir(parents=True)
    disk = folder / "disk"
    disk.mkdir()
    if own:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(disk)], check=True)
    clock = Clock(folder)
    usual = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    usual |= {"GLOO_SOCKET_IFNAME": "lo"} if own else {}
    usual |= {"ZERO_DS_SILENCE": str(SILENCE), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
    usual["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings, story = make_recipe(folder), Story()
    probe = Job(folder, "probe", folder, usual, restarts=0)
    write_recipe(probe, settings, 20, zero)
    seconds = undisturbed(probe)
    steps = max(20, round(min(180.0, 60 * minutes * 0.25) / seconds))
    reference = Job(folder, "undisturbed", folder, usual, restarts=0)
    write_recipe(reference, settings, steps, zero)
    undisturbed(reference)
    story.say(f"undisturbed: {steps} steps of {seconds:.2f} s")
    chance, until = random.Random(seed), time.monotonic() + 60 * minutes
    runs = 0
    while time.monotonic() < until and not story.problems:
        runs += 1
        job = Job(folder, f"disturbed-{runs}", disk, {**usual, **clock.environment()}, restarts=1000)
        write_recipe(job, settings, steps, zero)
        faults = Faults(job, chance, clock, own)
        faults.kinds = {name: fault for name, fault in faults.kinds.items() if not only or name in only}
        try:
            disturbed(job, faults, steps, until, story)
        finally:
            faults.undo()
            _signal(job.processes() if job.status() is None else [], signal.SIGKILL)
        compare(job, reference.run, steps, folder / "tmp", story)
        story.say(f"run {runs}: {'as undisturbed' if not story.problems else 'OTHER'}")
        if not story.problems:
            shutil.rmtree(job.run)
    counts = ", ".join(f"{count} {name}" for name, count in story.faults.most_common())
    story.say(f"{runs} runs, {sum(story.faults.values())} faults: {counts}")
    if faults.impossible:
        story.say(f"not possible here: {', '.join(faults.impossible)}")
    story.end(None if work else folder)


if __name__ == "__main__":
    typer.run(main)
