"""Writes tests/support/older_run: runs and models as the code wrote them before its modules moved into packages.

It was run once, with the code of commit 6b2261b, whose module names it uses; it does not run with today's code:

    git worktree add OLDER 6b2261b && cp tests/support/make_older_run.py OLDER/tests/
    cd OLDER && PYTHONPATH=. python tests/make_older_run.py .../tests/support/older_run

The folder holds, with paths relative to it:

    models/target, models/clip, models/surrogate   tiny models, and the surrogate that the old code cut
    data/                                          samples and images
    pretrain/                                      a run of 4 steps, stopped by a signal after step 2, with resume state
    encoder/                                       a finished run that started from it, without its resume state
    expected.json                                  results of the old code on them: the losses of the resumed run, the
                                                   graft's answers, and a hash of every file of two exports

tests/training/test_older_runs.py does the same with today's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
STEPS = 4
STOPPED_AFTER = 2
QUESTIONS = ("What is shown here?", "Which colour is it?")


def settings(stage: str, **changes: Any) -> Any:
    from zero_ds.config import RunConfig

    return RunConfig.model_validate(
        {
            "stage": stage,
            "target": "models/target",
            "surrogate": "models/surrogate",
            "encoder": {"path": "models/clip"},
            "data": {"sources": [{"path": "data/data.json"}], "max_length": 512, "system_prompt": ""},
            "optimizer": {"learning_rate": 1e-2},
            "global_batch": 4,
            "micro_batch": 1,
            "max_steps": STEPS,
            "precision": "fp32",
            "activation_checkpointing": False,
            "zero": "zero2",
            "out": stage,
            **changes,
        }
    )


def train(folder: Path, stage: str, changes: dict[str, Any], stop_after: int | None = None) -> str:
    """Trains in `folder` in a process of its own, which a signal asks to end during step `stop_after`."""
    os.chdir(folder)
    from distributed_helper import train_all
    from zero_ds.engine import Engine

    step_of_engine = Engine.step

    def signalled(self: Engine, batches: Any, number: int, *counts: Any) -> Any:
        if number + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of_engine(self, batches, number, *counts)

    Engine.step = signalled
    return str(train_all([settings(stage, **changes)])[0])


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def answers() -> list[str]:
    from zero_ds.generate import Answerer
    from zero_ds.named_model import find_model, load_model

    from zero_ds.data.conversations import PLACEHOLDER, Turn

    loaded = load_model(find_model("encoder", "models/target"))
    answerer = Answerer(loaded.model, loaded.encoder, max_new_tokens=12)
    return [
        answerer.reply([Turn("user", f"{PLACEHOLDER}\n{question}")], [f"data/images/{number}.png"])
        for number, question in enumerate(QUESTIONS)
    ]


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file. Entries of JSON files that name versions of libraries do not count."""
    content = path.read_bytes()
    if path.suffix == ".json":
        tree = json.loads(content)
        for key in ("transformers_version", "versions"):
            tree.pop(key, None)
        content = json.dumps(tree, indent=2).encode()
    return hashlib.sha256(content).hexdigest()


def exported() -> dict[str, dict[str, str]]:
    from zero_ds.export import export_model

    found = {}
    for form in ("llava", "remote-code"):
        out = Path(f"export-{form}")
        export_model(Path("encoder"), None, out, form=form, proof="tensors")
        files = sorted(path for path in out.rglob("*") if path.is_file())
        found[form] = {str(path.relative_to(out)): file_hash(path) for path in files}
        shutil.rmtree(out)
    return found


def main(out: Path) -> None:
    import tiny
    from distributed_helper import run_ranks

    from zero_ds.surrogate import Replaced, build_surrogate

    out.mkdir(parents=True)
    os.chdir(out)
    Path("models").mkdir()
    tiny.llama(Path("models/target"), tied=True, layers=4)
    tiny.clip(Path("models/clip"), layers=2)
    build_surrogate(Path("models/target"), [Replaced(1, 2)], Path("models/surrogate"))
    tiny.write_data(Path("data"), pictures=4, texts=1)

    (ended,) = run_ranks(train, 1, out, "pretrain", {}, STOPPED_AFTER)
    assert "after step 2; run again to resume" in ended, ended
    (ended,) = run_ranks(train, 1, out, "encoder", {"init_from": ["pretrain"], "max_steps": 2})
    assert ended == "step-000002", ended
    for run in ("pretrain", "encoder"):
        shutil.rmtree(Path(run) / "tensorboard")  # its file names hold the machine's name
    shutil.rmtree("encoder/step-000002/resume")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(out, Path(scratch) / "copy")
        (ended,) = run_ranks(train, 1, Path(scratch) / "copy", "pretrain", {})
        assert ended == "step-000004", ended
        resumed = losses(Path(scratch) / "copy" / "pretrain")
    expected = {
        "questions": QUESTIONS,
        "losses": {str(step): loss for step, loss in resumed.items()},
        "answers": answers(),
        "exports": exported(),
    }
    Path("expected.json").write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(Path(sys.argv[1]).resolve())
