"""Writes answers of this package's models, for launch/test_stock.sh: other software must give them with the exports.

`run` asks a run on its full model about images of the demo. `tiny` trains tiny random models of every family with every
vision encoder for two steps, exports them and asks them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers.utils import logging

from zero_ds.config.schema import RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN, PLACEHOLDER, Turn
from zero_ds.export import export_model, proof
from zero_ds.export.source import open_source
from zero_ds.export.text import text_settings
from zero_ds.grafting.engines.vllm import answerer
from zero_ds.grafting.load import load_trained
from zero_ds.grafting.named_model import find_model, load_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.encoders import ENCODERS

TEXTS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs has a spider?",
    "Say hello in French.",
    "Is the sun a star?",
    "What comes after Tuesday?",
    "Who wrote Hamlet?",
    "What do bees make?",
)
TOKENS = 24

app = typer.Typer(add_completion=False)
logging.disable_progress_bar()


@app.command()
def run(
    run: Annotated[str, typer.Argument(help="Run folder with a trained encoder.")],
    target: Annotated[str, typer.Option(help="Full language model.")],
    records: Annotated[Path, typer.Option(help="Held-out records of the demo.")],
    out: Annotated[Path, typer.Option(help="Existing folder; asked.json is written into it.")],
    images: Annotated[int, typer.Option("--pictures", help="Number of questions with an image.", min=1)] = 16,
) -> None:
    """Write the graft's greedy answers to questions about images of the demo, and to questions without an image."""
    ours = answerer(load_model(find_model(run, target)), max_new_tokens=TOKENS)
    asked = []
    for record in json.loads(records.read_text(encoding="utf-8"))[:images]:
        image = str((records.parent / record["image"]).resolve())
        turn = Turn("user", f"{PLACEHOLDER}\n{record['question']}")
        asked.append({"image": image, "question": record["question"], "answer": ours.reply([turn], [image])})
    for text in TEXTS:
        asked.append({"image": None, "question": text, "answer": ours.reply([Turn("user", text)])})
    content = {"tokens": TOKENS, "asked": asked}
    (out / "asked.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(f"{len(asked)} questions, {sum(bool(one['image']) for one in asked)} of them with an image")


@app.command()
def tiny(out: Annotated[Path, typer.Option(help="New folder.")]) -> None:
    """Train, export and ask tiny models; writes NAME/export, NAME/asked.json and NAME/asked.safetensors for each."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))
    from distributed_helper import run_ranks, train_all
    from tiny import ENCODERS as ENCODER_BUILDERS
    from tiny import FAMILIES as BUILDERS
    from tiny import VARIANTS, write_data

    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="tiny-") as scratch:
        root = Path(scratch)
        data = write_data(root / "data")
        for encoder in ENCODERS:
            ENCODER_BUILDERS[encoder](root / encoder)
        configs: dict[str, RunConfig] = {}
        forms: dict[str, str] = {}
        for family in [*FAMILIES, *VARIANTS]:
            for tied in (True, False):
                decoder = root / f"{family}-{'tied' if tied else 'untied'}"
                (BUILDERS | VARIANTS)[family](decoder, tied=tied)
                if not family.startswith("qwen"):
                    _begin_texts(decoder)
                for encoder in ENCODERS:
                    name = f"{decoder.name}-{encoder}"
                    configs[name] = _config(root, decoder, root / encoder, data, name)
                    forms[name] = "remote-code" if family == "gemma2" else "llava"  # Llava does not cap scores
        extras = {"adapter": {"boundary_tokens": True}, "patch_norm": True}
        decoder, encoder = root / "llama-untied", root / next(iter(ENCODERS))
        configs["llama-as-released"] = _config(root, decoder, encoder, data, "llama-as-released", **extras)
        forms["llama-as-released"] = "remote-code"
        (ends,) = run_ranks(train_all, 1, list(configs.values()), timeout=500)
        assert set(ends) == {"step-000002"}, ends
        for name, config in configs.items():
            _export(config, out / name, forms[name])
            print(f"{name}: trained, exported as {forms[name]}")


def _begin_texts(folder: Path) -> None:
    """Makes a tokenizer like Llama's and Gemma's: a token begins every text, and its end token closes no turn."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    begin = words.bos_token
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, words.bos_token_id)]
    )
    words.eos_token = words.pad_token
    words.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == words.bos_token_id


def _config(root: Path, decoder: Path, encoder: Path, data: Path, name: str, **more: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "stage": "decoder",
        "target": str(decoder),
        "decoder": "target",
        "encoder": {"path": str(encoder), "patch_norm": more.pop("patch_norm", False)},
        "data": {"sources": [{"path": str(data)}], "max_length": 512, "system_prompt": None},
        "optimizer": {"learning_rate": 1e-4},  # small, so that answers to different questions stay different
        "global_batch": 4,
        "micro_batch": 1,
        "max_steps": 2,
        "precision": "fp32",
        "zero": "zero2",
        "out": str(root / f"run-{name}"),
        **more,
    }
    return RunConfig.model_validate(settings)


def _export(config: RunConfig, out: Path, form: str) -> None:
    """Exports a run, and writes its source's answers to the questions of a proof, which stock software must repeat."""
    out.mkdir()
    export_model(config.out, None, out / "export", form=form, proof="tensors")
    source = open_source(config.out, None)
    words = text_settings(source)
    side = source.vision.image_size
    image = proof.draw_image((side, side), out / "image.png")
    model = load_trained(source.checkpoint.folder, source.decoder)
    asked, tensors = [], {}
    for number, one in enumerate(proof.ask_source(source, words, model, image)):
        ids = [words.image_token_id if token == IMAGE_TOKEN else token for token in one.ids]
        tensors[f"{number}.ids"], tensors[f"{number}.answer"] = torch.tensor(ids), torch.tensor(one.answer)
        tensors[f"{number}.logits"] = one.logits[: min(proof.POSITIONS, len(ids))].contiguous()
        said = str(words.tokenizer.decode(one.answer, skip_special_tokens=True)).strip()
        shown = str(image.resolve()) if one.image else None
        asked.append({"image": shown, "question": one.question, "answer": said})
    save_file(tensors, out / "asked.safetensors")
    content = {"tokens": proof.TOKENS, "remote_code": form == "remote-code", "asked": asked}
    (out / "asked.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    app()
