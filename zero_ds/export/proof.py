"""The proof of an export: every tensor against its source, then the folder's answers, loaded by transformers alone."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from zero_ds.data.conversations import IMAGE_TOKEN, PLACEHOLDER, Turn
from zero_ds.data.sources import Sample
from zero_ds.export.fresh import answer, batch
from zero_ds.export.source import Source
from zero_ds.export.tensors import read, values
from zero_ds.export.text import Texts
from zero_ds.grafting.graft import load_trained
from zero_ds.model.build import sample_encoder
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import Span, Tensor, shard_files, spans
from zero_ds.training.checkpoint.manifest import versions

Finish = Callable[[], tuple[int, str]]
"""Waits for a process to end: -> exit status, what it said."""
PROOFS = ("full", "tensors")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest difference of logits between source and exported folder."""
PIXELS = 1e-5
"""Largest difference of pixel values between the two processors, on a picture of the encoder's size."""
POSITIONS = 8
"""Last positions of a prompt of which logits are compared, beside those of the answer."""
TOKENS = 12
"""Longest greedy answer."""
QUESTIONS = (
    "what is shown here?",
    "Describe this in one sentence.",
    "Which colours do you see?",
    "How many things are there?",
    "What is on the left?",
    "Is there a person? Answer yes or no.",
    "What could happen next?",
    "Name three words that fit.",
)


@dataclass(frozen=True)
class Loaded:
    """A tensor of a model in memory."""

    name: str
    value: torch.Tensor
    exact: bool
    """Whether the written one is this one, rounded; otherwise it was computed in another order."""


def compare_files(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Compares every tensor of a written folder with what should stand in it, block by block.

    Returns how many. Raises ConfigError that names the first that differs.
    """
    written = _written(folder)
    wanted = list(tensors)
    _same_names(set(written), {name for name, _ in wanted})
    for name, tensor in wanted:
        found = written[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise _differs(name, f"it is {found.dtype} {found.shape}, and should be {tensor.dtype} {tensor.shape}")
        for ours, theirs in zip(_regular(values(tensor)), _regular(values(found)), strict=True):
            _same_values(name, theirs, ours, exact=True)
    return len(wanted)


def compare_loaded(folder: Path, tensors: Iterable[Loaded]) -> int:
    """As `compare_files`, with the tensors of a model that was loaded by other means."""
    written = _written(folder)
    names = set()
    for tensor in tensors:
        if tensor.name not in written:
            raise ConfigError(f"the exported folder lacks {tensor.name}.")
        found = read(written[tensor.name])
        if found.shape != tensor.value.shape:
            raise _differs(
                tensor.name, f"it has shape {tuple(found.shape)}, and should have {tuple(tensor.value.shape)}"
            )
        _same_values(tensor.name, found, tensor.value.to(found.dtype), tensor.exact)
        names.add(tensor.name)
    _same_names(set(written), names)
    return len(names)


def _written(folder: Path) -> dict[str, Span]:
    files = shard_files(folder)
    by_file = {file: spans(file) for file in set(files.values())}
    return {name: by_file[file][name] for name, file in files.items()}


def _same_names(written: set[str], wanted: set[str]) -> None:
    if other := sorted(written ^ wanted):
        raise ConfigError(f"the exported folder {'has' if other[0] in written else 'lacks'} {other[0]}.")


def _regular(blocks: Iterator[torch.Tensor], size: int = 1 << 22) -> Iterator[torch.Tensor]:
    """The same elements in blocks of one size, so that two ways of cutting meet."""
    left = torch.empty(0)
    for block in blocks:
        whole = torch.cat([left.to(block.dtype), block]) if len(left) else block
        full = len(whole) // size * size
        yield from whole[:full].split(size)
        left = whole[full:]
    if len(left):
        yield left


def _same_values(name: str, found: torch.Tensor, wanted: torch.Tensor, exact: bool) -> None:
    if torch.equal(found, wanted):
        return
    gap = float((found.double() - wanted.double()).abs().max())
    allowed = 0.0 if exact else 4 * torch.finfo(found.dtype).eps * float(wanted.double().abs().max())
    if not gap <= allowed:
        raise _differs(name, f"by {gap:.2g}")


def _differs(name: str, how: str) -> ConfigError:
    return ConfigError(f"the exported folder differs from its source, first in the tensor {name} ({how}).")


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the source makes of a prompt."""

    question: str
    picture: str | None
    ids: list[int]
    """With IMAGE_TOKEN where an image token stands."""
    pixels: torch.Tensor | None
    """(views, 3, size, size)"""
    logits: torch.Tensor
    """(positions, vocabulary), of the last POSITIONS of the prompt and of the answer's tokens but the last."""
    answer: list[int]


@torch.no_grad()
def ask(source: Source, texts: Texts, model: VisionLanguageModel, picture: Path) -> list[Asked]:
    """Every question with the picture and without, by the code of training.

    The questions with it are one batch, and those without it another; logits are taken where the answer is generated.
    """
    fixed = "off" if source.config.data.image_prompt == "off" else "fixed"
    data = source.config.data.model_copy(update={"image_prompt": fixed})
    encoder = sample_encoder(model, source.folder, source.encoder_folder, data)
    pad, stops = texts.generation["pad_token_id"], list(texts.stops)
    decoder = cast(Any, model.decoder)
    asked: dict[tuple[str, str | None], Asked] = {}
    for shown in (str(picture), None):
        prompts: list[dict[str, torch.Tensor]] = []
        for question in QUESTIONS:
            text = f"{PLACEHOLDER}\n{question}" if shown else question
            sample = Sample("proof", (Turn("user", text),), (shown,) if shown else ())
            counts = encoder.image_tokens(sample)
            encoded = encoder.encode(encoder.turns(sample), generate=True, image_tokens=counts)
            ids = torch.tensor([encoded.input_ids])
            prompts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            if shown:
                prompts[-1]["pixel_values"] = encoder.pixels(sample)
        inputs = batch(prompts, pad)

        def generate(inputs: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
            done: torch.Tensor = decoder.generate(
                inputs_embeds=model.embed(inputs["input_ids"], inputs.get("pixel_values")),
                attention_mask=inputs["attention_mask"],
                max_new_tokens=TOKENS,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                eos_token_id=stops,
                pad_token_id=pad,
            )
            return done

        answers, logits = answer(
            generate,
            getattr(decoder, model.family.backbone),
            lambda output: model.logits(output.last_hidden_state[:, -POSITIONS:]),
            [prompt["input_ids"].shape[1] for prompt in prompts],
            stops,
            POSITIONS,
        )
        for question, prompt, found, scores in zip(QUESTIONS, prompts, answers, logits, strict=True):
            read = prompt["input_ids"][0].tolist()
            asked[question, shown] = Asked(question, shown, read, prompt.get("pixel_values"), scores, found)
    return [asked[question, shown] for question in QUESTIONS for shown in (str(picture), None)]


def draw(size: tuple[int, int], path: Path) -> Path:
    """A picture (width, height) without a symmetry."""
    from PIL import Image

    gradient = Image.linear_gradient("L")
    channels = [gradient.rotate(angle).resize(size) for angle in (0, 90, 180)]
    Image.merge("RGB", channels).save(path)
    return path


@contextmanager
def start_fresh(folder: Path, remote_code: bool, picture: Path, scratch: Path) -> Iterator[Finish]:
    """Has the folder answer the same prompts in a new process that cannot import this package.

    It imports its libraries and reads the prompts while the source answers; it loads the model when what is yielded is
    called, so that both are never in memory together. Code that the folder brings is cached in `scratch` alone.
    """
    content = {
        "folder": str(folder.resolve()),
        "remote_code": remote_code,
        "threads": torch.get_num_threads(),
        "positions": POSITIONS,
        "tokens": TOKENS,
        "prompts": [[question, shown] for question in QUESTIONS for shown in (str(picture), None)],
    }
    (scratch / "asked.json").write_text(json.dumps(content), encoding="utf-8")
    with run_fresh(scratch) as finish:
        yield finish


@contextmanager
def run_fresh(scratch: Path) -> Iterator[Finish]:
    """fresh.py in a new interpreter, which ends with the block."""
    script = (Path(__file__).parent / "fresh.py").read_text(encoding="utf-8")
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(scratch)]
    with (
        (scratch / "said.txt").open("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, cwd=scratch, env=environment
        ) as process,
    ):

        def finish() -> tuple[int, str]:
            process.communicate("\n")
            said.seek(0)
            return process.returncode, said.read()

        try:
            yield finish
        finally:
            process.kill()  # of no effect where it has ended


def ask_fresh(finish: Finish, asked: list[Asked], scratch: Path) -> dict[str, Any]:
    """What the exported folder makes of the same prompts; see `start_fresh`.

    Raises:
        ConfigError: transformers alone cannot load the folder, or some tensor of its class is not in it.
    """
    from safetensors.torch import load_file, save_file

    pixels = {str(number): one.pixels for number, one in enumerate(asked) if one.pixels is not None}
    save_file(pixels, scratch / "pixels.safetensors")
    status, said = finish()
    path = scratch / "answers.json"
    if status or not path.is_file():
        reason = said.strip().splitlines()[-1] if said.strip() else f"exit status {status}"
        raise ConfigError(f"transformers alone could not load the exported folder: {reason}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["unfilled"]:
        raise ConfigError(f"the exported folder does not fill transformers' class: {result['unfilled'][0]}.")
    logits = load_file(scratch / "logits.safetensors")
    for number, one in enumerate(result["answers"]):
        one["logits"] = logits[str(number)]
    return result


def compare_answers(source: Source, texts: Texts, asked: list[Asked], fresh: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a prompt, with the largest difference of logits.

    Raises:
        ConfigError: other tokens in a prompt, logits or pixel values beyond the tolerance, or another answer.
    """
    tolerance = TOLERANCE[source.dtype]
    lines = []
    for ours, theirs in zip(asked, fresh["answers"], strict=True):
        kind = f"'{ours.question}' {'with a picture' if ours.picture else 'without a picture'}"
        ids = [texts.image_token_id if token == IMAGE_TOKEN else token for token in ours.ids]
        gap = _largest_difference(ours, theirs)
        for holds, what in (
            (ids == theirs["ids"], f"its prompt has other tokens ({len(theirs['ids'])}, not {len(ids)})"),
            (theirs["pixels"] <= PIXELS, f"pixel values are apart by {theirs['pixels']:.2g} (at most {PIXELS})"),
            (gap <= tolerance, f"logits are apart by {gap:.2g} (at most {tolerance})"),
            (ours.answer == theirs["answer"], "the greedy answers are not the same"),
        ):
            if not holds:
                raise ConfigError(
                    f"the exported model differs from its source on {kind}, although every tensor is the same: {what}."
                )
        lines.append(
            {
                "question": ours.question,
                "picture": ours.picture is not None,
                "prompt_tokens": len(ids),
                "largest_logit_difference": gap,
                "largest_pixel_difference": theirs["pixels"],
                "answer_tokens": len(ours.answer),
                "answers_equal": True,
            }
        )
    return lines


def _largest_difference(ours: Asked, theirs: dict[str, Any]) -> float:
    """Between logits, up to where the answers part."""
    pairs = zip(ours.answer, theirs["answer"], strict=False)
    parted = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    one, other = ours.logits.float(), theirs["logits"].float()
    rows = min(len(one), len(other))
    if parted is not None:  # behind the prompt's last position stands one token of the answer after the other
        rows = min(rows, len(one) - (len(ours.answer) - 1) + parted)
    return float((one[:rows] - other[:rows]).abs().max())


def prove(kind: str, source: Source, texts: Texts, layout: Any, folder: Path) -> dict[str, Any]:
    """Content of proof.json; `layout` is the module of the format.

    full: a second reader of the run loads the whole model, each of whose tensors must be the folder's; then the folder
    is loaded by transformers alone, in another process, and both answer. tensors: every tensor of the folder is read
    again and compared with the source's files, in blocks; nothing is loaded whole, and no answer is compared.

    Raises:
        ConfigError: something differs; a tensor is named.
    """
    proof: dict[str, Any] = {
        "kind": kind,
        "dtype": str(source.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    if kind == "tensors":
        proof["tensors_equal"] = compare_files(folder, layout.tensors(source))
        proof["loaded_by_transformers"] = False
        return proof
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        side = source.vision.image_size
        # of another size, Llava's processor rounds once more to eight bits; ours pads, resizes and cuts as in training
        size = (2 * side + 10, side + 4) if layout.REMOTE_CODE else (side, side)
        picture = draw(size, scratch / "picture.png")
        with start_fresh(folder, layout.REMOTE_CODE, picture, scratch) as finish:
            model = load_trained(source.commit.folder, str(source.folder), dtype=source.dtype)
            loaded = (Loaded(*entry) for entry in layout.loaded(source, model))
            proof["tensors_equal"] = compare_loaded(folder, loaded)
            asked = ask(source, texts, model, picture)
            del model, loaded
            gc.collect()
            fresh = ask_fresh(finish, asked, scratch)
        lines = compare_answers(source, texts, asked, fresh)
    proof["loaded_by_transformers"] = fresh["class"]
    proof["tolerance"] = TOLERANCE[source.dtype]
    proof["largest_logit_difference"] = max(line["largest_logit_difference"] for line in lines)
    proof["prompts"] = lines
    return proof
