"""Compares trajectory, surrogate and export with the scripts that one would write without this package, in turns.

    python tools/bench/scripts.py compare --runs runs --out scripts.json

Every round starts new processes, one after the other; seconds and peak resident set are those of a process and its
children, imports included. The obvious scripts are the other commands of this file. Ours does more: the trajectory
includes statistics and a plot, the surrogate has hashes, and the export has a proof (`full`: logits and answers of a
fresh process). `loader.py` compares data loading.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import report
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def trajectory(model: Path, data: Path, samples: int, out: Path) -> None:
    """Run the obvious script: all hidden states of a text through norm and head, and KL (Eq. 1-4) to the last layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    roles = {"human": "user", "gpt": "assistant"}
    curves = []
    for record in json.loads(data.read_text(encoding="utf-8"))[:samples]:
        messages = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            states = decoder(ids, output_hidden_states=True).hidden_states
            chosen = []
            for number, state in enumerate(states[1:], start=2):
                normed = state if number == len(states) else decoder.model.norm(state)
                scores = decoder.lm_head(normed).float().softmax(-1)[0, :-1]
                probability = scores.gather(1, ids[0, 1:, None])[:, 0]
                chosen.append(probability / probability.sum())
        last = chosen[-1]
        curves.append([float((q * (q / last).log()).sum()) for q in chosen])
    out.write_text(json.dumps(curves), encoding="utf-8")


@app.command()
def surrogate(model: Path, first: int, last: int, out: Path) -> None:
    """Run the obvious script: load the model, drop layers, save it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    layers = list(decoder.model.layers)
    decoder.model.layers = torch.nn.ModuleList(layers[: first + 1] + layers[last + 1 :])
    for number, layer in enumerate(decoder.model.layers):
        layer.self_attn.layer_idx = number
    decoder.config.num_hidden_layers = len(decoder.model.layers)
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[: len(decoder.model.layers)]
    decoder.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


@app.command()
def export(model: Path, encoder: Path, weights: Path, like: Path, out: Path) -> None:
    """Run the obvious script: load all weights, put them into a Llava, save it. LIKE is a folder with its config."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, CLIPVisionModel
    from transformers import LlavaForConditionalGeneration as Llava

    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tower: Any = CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32)
    whole: Any = Llava(AutoConfig.from_pretrained(like))
    trained = load_file(weights)
    whole.model.language_model.load_state_dict(decoder.model.state_dict())
    state = {**tower.state_dict(), **{k.removeprefix("encoder."): v for k, v in trained.items() if k[:8] == "encoder."}}
    whole.model.vision_tower.load_state_dict(state)
    for ours, theirs in (("adapter.0.", "linear_1"), ("adapter.2.", "linear_2")):
        part = getattr(whole.model.multi_modal_projector, theirs)
        part.load_state_dict({k.removeprefix(ours): v for k, v in trained.items() if k.startswith(ours)})
    whole.tie_weights()
    whole.save_pretrained(out)
    processor: Any = AutoProcessor
    processor.from_pretrained(like).save_pretrained(out)


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Runs a command; returns its seconds, and the peak GiB of the process or one of its children.

    Raises:
        RuntimeError: the command failed.
    """
    started = time.perf_counter()
    # wait4 gives the usage of this child and its descendants; RUSAGE_CHILDREN is the largest of all children so far
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said[-3000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def commands(runs: Path, model: Path, replace: str, samples: int, out: Path) -> dict[str, dict[str, list[str]]]:
    """Returns the command of each way of each task, as task -> way -> command."""
    ours = [sys.executable, "-m", "zero_ds.cli"]
    script = [sys.executable, str(Path(__file__).resolve())]
    data, run_folder = str(runs / "demo/data/trajectory.json"), runs / "quickstart/encoder"
    checkpoint = run_folder / (run_folder / "latest").read_text(encoding="utf-8").strip()
    cut = ["--target", str(model), "--replace", replace, "--out", str(out)]
    exported = [*ours, "export", str(run_folder), "--target", str(model), "--dtype", "float32", "--out", str(out)]
    end = replace.split(":")
    return {
        "trajectory": {
            "ours": [
                *[*ours, "trajectory", "--model", str(model), "--data", data],
                *["--samples", str(samples), "--dtype", "bfloat16", "--out", str(out)],
            ],
            "obvious script": [*script, "trajectory", str(model), data, str(samples), str(out)],
        },
        "surrogate": {
            "ours": [*ours, "surrogate", *cut],
            "obvious script": [*script, "surrogate", str(model), *end, str(out)],
        },
        "export": {
            "ours, proof full": exported,
            "ours, proof tensors": [*exported, "--proof", "tensors"],
            "obvious script": [
                *[*script, "export", str(model), str(runs / "demo/encoder")],
                *[str(checkpoint / "weights.safetensors"), str(runs / "quickstart/export"), str(out)],
            ],
        },
    }


@app.command()
def compare(
    runs: Annotated[Path, typer.Option(help="Folder with demo/ and quickstart/, as launch/quickstart.sh leaves it.")],
    model: Annotated[Path, typer.Option(help="Full model.")] = Path("~/.cache/zero_ds/smollm2-135m-instruct"),
    replace: Annotated[str, typer.Option(help="Layers that one translator replaces, first:last.")] = "24:28",
    samples: Annotated[int, typer.Option(help="Texts of the trajectory.")] = 64,
    task: Annotated[list[str] | None, typer.Option(help="trajectory, surrogate or export; all by default.")] = None,
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare the ways of each task."""
    runs, model = runs.resolve(), model.expanduser().resolve()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "out"
        for what, ways in commands(runs, model, replace, samples, result).items():
            if task and what not in task:
                continue
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, command in ways.items():
                    found[way].append(run(command, runs.parent))  # manifests name folders relative to it
                    if result.is_dir():
                        shutil.rmtree(result)
                    else:
                        result.unlink(missing_ok=True)
            for way, turns in found.items():
                seconds, peak = ([turn[i] for turn in turns] for i in (0, 1))
                rows.append({"task": what, "way": way, "seconds": seconds, "peak_gib": report.median(peak)})
                print(f"{what}, {way}: {report.spread(seconds)} s", file=sys.stderr, flush=True)
    cells = [[r["task"], r["way"], report.spread(r["seconds"]), r["peak_gib"]] for r in rows]
    print(report.table(["task", "way", "seconds", "peak GiB"], cells))
    report.write(out, {"rows": rows})


if __name__ == "__main__":
    app()
