"""The proof of an export: compares every tensor with its source, then the answers of the folder and of the source.

The folder answers in a process of its own, in which transformers loads it and this package cannot be imported.
"""

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
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Sample
from zero_ds.export import fresh
from zero_ds.export.formats import ExportFormat, LoadedTensor
from zero_ds.export.source import Source
from zero_ds.export.tensors import read, values
from zero_ds.export.text import TextSettings
from zero_ds.grafting.load import load_trained
from zero_ds.model.build import sample_encoder
from zero_ds.model.decoding import generate_from
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import Span, Tensor, shard_files, spans
from zero_ds.training.checkpoint.manifest import versions

Finish = Callable[[], tuple[int, str]]
"""Function that lets a waiting process continue, waits for its end, and returns its exit status and output."""

PROOFS = ("full", "tensors")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest difference of logits between source and exported folder, by the number format of the export."""
PIXELS = 1e-5
"""Largest difference of pixel values between the two processors, for an image of the encoder's size."""
POSITIONS = 8
"""Number of last positions of a prompt whose logits are compared, in addition to those of the answer."""
TOKENS = 12
"""Longest greedy answer, in tokens."""
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


def prove(kind: str, source: Source, texts: TextSettings, layout: ExportFormat, folder: Path) -> dict[str, Any]:
    """Compares an exported folder with its source; returns the content of proof.json.

    kind: `full` or `tensors`. For a full proof, the code that evaluates runs loads the whole model, each of whose
    tensors must be in the folder; then transformers alone loads the folder in another process, and both models answer
    the same questions. For a proof of tensors, every tensor of the folder is read again and compared with the source's
    files, in blocks; nothing is loaded whole and no answers are compared.

    Raises:
        ConfigError: the folder differs from its source; the message names the tensor or the question.
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
        image, kinds = None, dict[str, Path]()
        if source.sees:
            size = _image_size(source, layout)
            image = draw_image(size, scratch / "image.png")
            kinds = draw_kinds(size, scratch)
        with start_fresh(folder, layout.remote_code, image, scratch, kinds) as finish:
            model = load_trained(source.checkpoint.folder, source.decoder, dtype=source.dtype)
            proof["tensors_equal"] = compare_loaded(folder, layout.loaded_tensors(source, model))
            ours = ask_source(source, texts, model, image)
            seen = look_at(source, model, kinds)
            del model
            gc.collect()
            theirs = ask_fresh(finish, ours, scratch, seen)
    lines = compare_answers(source, texts, ours, theirs)
    proof["loaded_by_transformers"] = theirs["class"]
    proof["tolerance"] = TOLERANCE[source.dtype]
    proof["largest_logit_difference"] = max(line["largest_logit_difference"] for line in lines)
    proof["prompts"] = lines
    proof["images"] = compare_kinds(theirs["pixel_differences"])
    return proof


def _image_size(source: Source, layout: ExportFormat) -> tuple[int, int]:
    """Returns width and height of an image on which the two processors must agree.

    For images of another size than the encoder's, Llava's processor rounds once more to eight bits than training does.
    Our own processor pads, resizes and cuts as in training, so it is tested on an image that needs all of that.
    """
    side = source.image_size
    return (2 * side + 10, side + 4) if layout.remote_code else (side, side)


# -- tensors -----------------------------------------------------------------------------------------------------------


def compare_files(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Compares every tensor of a written folder with its source, block by block; returns their number.

    Raises:
        ConfigError: a tensor differs, is missing, or is not the source's; the message names the first one.
    """
    written = _written_tensors(folder)
    wanted = dict(tensors)
    _check_same_names(written.keys(), wanted.keys())
    for name, tensor in wanted.items():
        found = written[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise _differs(name, f"it is {found.dtype} {found.shape}, and should be {tensor.dtype} {tensor.shape}")
        for expected, block in zip(_equal_blocks(values(tensor)), _equal_blocks(values(found)), strict=True):
            _check_same_values(name, block, expected, exact=True)
    return len(wanted)


def compare_loaded(folder: Path, tensors: Iterable[LoadedTensor]) -> int:
    """Compares every tensor of a written folder with a model in memory; returns their number.

    Raises:
        ConfigError: as `compare_files`.
    """
    written = _written_tensors(folder)
    compared = set()
    for tensor in tensors:
        if tensor.name not in written:
            raise ConfigError(f"the exported folder lacks {tensor.name}.")
        found, expected = read(written[tensor.name]), tensor.value
        if found.shape != expected.shape:
            raise _differs(tensor.name, f"it has shape {tuple(found.shape)}, and should have {tuple(expected.shape)}")
        _check_same_values(tensor.name, found, expected.to(found.dtype), tensor.exact)
        compared.add(tensor.name)
    _check_same_names(written.keys(), compared)
    return len(compared)


def _written_tensors(folder: Path) -> dict[str, Span]:
    files = shard_files(folder)
    spans_of = {file: spans(file) for file in set(files.values())}
    return {name: spans_of[file][name] for name, file in files.items()}


def _check_same_names(written: Iterable[str], wanted: Iterable[str]) -> None:
    written, wanted = set(written), set(wanted)
    if written != wanted:
        first = min(written ^ wanted)
        raise ConfigError(f"the exported folder {'has' if first in written else 'lacks'} {first}.")


def _equal_blocks(blocks: Iterator[torch.Tensor], size: int = 1 << 22) -> Iterator[torch.Tensor]:
    """Yields the same elements in blocks of `size`, so that tensors can be compared however they were cut."""
    left = torch.empty(0)
    for block in blocks:
        whole = torch.cat([left.to(block.dtype), block]) if len(left) else block
        full = len(whole) // size * size
        yield from whole[:full].split(size)
        left = whole[full:]
    if len(left):
        yield left


def _check_same_values(name: str, found: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    """Raises ConfigError if values differ: at all, or, if they are not exact, by more than 4 ulp of the largest."""
    if torch.equal(found, expected):
        return
    gap = float((found.double() - expected.double()).abs().max())
    allowed = 0.0 if exact else 4 * torch.finfo(found.dtype).eps * float(expected.double().abs().max())
    if not gap <= allowed:  # this way round, so that not-a-number is refused
        raise _differs(name, f"by {gap:.2g}")


def _differs(name: str, how: str) -> ConfigError:
    return ConfigError(f"the exported folder differs from its source, first in the tensor {name} ({how}).")


# -- answers of the source ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceAnswer:
    """A question, and the source's prompt and answer to it."""

    question: str
    image: str | None
    """Image file."""
    ids: list[int]
    """Token ids of the prompt, with IMAGE_TOKEN at the positions of the image."""
    pixels: torch.Tensor | None
    """Pixel values: (views, 3, size, size)."""
    logits: torch.Tensor
    """(positions, vocabulary): of the prompt's last POSITIONS, then of the answer's tokens except the last."""
    answer: list[int]
    """Token ids of the greedy answer."""


def ask_source(
    source: Source, texts: TextSettings, model: VisionLanguageModel, image: Path | None
) -> list[SourceAnswer]:
    """Asks every question with the image, if the model sees, and without, with the code of training.

    The questions with the image are one batch, and those without it another. Logits are collected while the answers are
    generated.
    """
    encoder = _encoder(source, model)
    batches = [_ask_batch(texts, model, encoder, shown) for shown in _shown(image)]
    return [answer for answers in zip(*batches, strict=True) for answer in answers]


def _shown(image: Path | None) -> list[str | None]:
    """Returns what each question is asked with: an image, and nothing."""
    return [None] if image is None else [str(image), None]


def _encoder(source: Source, model: VisionLanguageModel) -> SampleEncoder:
    image_prompt = "off" if source.config.data.image_prompt == "off" else "fixed"
    data = source.config.data.model_copy(update={"image_prompt": image_prompt})
    return sample_encoder(model, source.decoder, source.encoder_folder if source.sees else None, data)


def look_at(source: Source, model: VisionLanguageModel, images: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Returns the pixel values that training makes of image files: (views, 3, size, size) of each."""
    encoder = _encoder(source, model)
    return {kind: encoder.pixels(Sample(kind, (), (str(path),))) for kind, path in images.items()}


@torch.no_grad()
def _ask_batch(
    texts: TextSettings, model: VisionLanguageModel, encoder: SampleEncoder, image: str | None
) -> list[SourceAnswer]:
    prompts = [_prompt(encoder, question, image) for question in QUESTIONS]
    inputs = fresh.batch(prompts, texts.generation["pad_token_id"])
    decoder = cast(Any, model.decoder)

    def generate() -> torch.Tensor:
        output: torch.Tensor = generate_from(
            decoder,
            model.embed(inputs["input_ids"], inputs.get("pixel_values")),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(texts.stops),
            pad_token_id=texts.generation["pad_token_id"],
        )
        return output

    answers, logits = fresh.answer(
        generate,
        watched=model.family.inner(decoder),
        scores=lambda output: model.logits(output.last_hidden_state[:, -POSITIONS:]),
        lengths=[prompt["input_ids"].shape[1] for prompt in prompts],
        stops=list(texts.stops),
        positions=POSITIONS,
    )
    found = []
    for question, prompt, answer, scores in zip(QUESTIONS, prompts, answers, logits, strict=True):
        ids = prompt["input_ids"][0].tolist()
        found.append(SourceAnswer(question, image, ids, prompt.get("pixel_values"), scores, answer))
    return found


def _prompt(encoder: SampleEncoder, question: str, image: str | None) -> fresh.Inputs:
    """Returns the model's inputs for a question, as training would make them."""
    text = question if image is None else PLACEHOLDER + question
    sample = Sample("proof", (Turn("user", text),), () if image is None else (image,))
    encoded = encoder.encode(encoder.turns(sample), generate=True, image_tokens=encoder.image_tokens(sample))
    ids = torch.tensor([encoded.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image is not None:
        inputs["pixel_values"] = encoder.pixels(sample)
    return inputs


def draw_image(size: tuple[int, int], path: Path) -> Path:
    """Writes an image without symmetries to a file. size: width and height."""
    from PIL import Image

    gradient = Image.linear_gradient("L")
    channels = [gradient.rotate(angle).resize(size) for angle in (0, 90, 180)]
    Image.merge("RGB", channels).save(path)
    return path


def draw_kinds(size: tuple[int, int], folder: Path) -> dict[str, Path]:
    """Writes images that readers disagree about, of this width and height when upright; returns their files by kind."""
    import numpy as np
    from PIL import ExifTags, Image

    gradient = Image.linear_gradient("L").resize(size)
    drawn = Image.merge("RGB", (gradient, gradient.rotate(180), gradient.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    transparent = drawn.copy()
    transparent.putalpha(gradient.rotate(180))
    turned = drawn.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    deep = Image.fromarray(np.asarray(gradient).astype(np.uint16) * 257)
    files = {kind: folder / f"{kind}.png" for kind in ("transparent", "turned", "sixteen-bit")}
    transparent.save(files["transparent"])
    turned.save(files["turned"], exif=exif)
    deep.save(files["sixteen-bit"])
    return files


# -- answers of the folder ---------------------------------------------------------------------------------------------


@contextmanager
def start_fresh(
    folder: Path, remote_code: bool, image: Path | None, scratch: Path, kinds: dict[str, Path] | None = None
) -> Iterator[Finish]:
    """Starts a process in which the folder answers the same questions, without this package (fresh.py).

    The process imports its libraries and prepares the prompts while the source answers. It loads the model when the
    yielded function is called, so that both models are never in memory together. Code that the folder contains is
    cached in `scratch` only.
    """
    asked = {
        "folder": str(folder.resolve()),
        "remote_code": remote_code,
        "threads": torch.get_num_threads(),
        "positions": POSITIONS,
        "tokens": TOKENS,
        "looked_at": {kind: str(path) for kind, path in (kinds or {}).items()},
        "prompts": [[question, shown] for question in QUESTIONS for shown in _shown(image)],
        "sees": image is not None,
    }
    (scratch / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    with run_fresh(scratch) as finish:
        yield finish


@contextmanager
def run_fresh(scratch: Path) -> Iterator[Finish]:
    """Runs fresh.py in a new interpreter, which is killed when the block ends."""
    script = Path(fresh.__file__).read_text(encoding="utf-8")
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(scratch)]
    with (
        (scratch / "output.txt").open("w+", encoding="utf-8", errors="replace") as output,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, cwd=scratch, env=environment
        ) as process,
    ):

        def finish() -> tuple[int, str]:
            process.communicate("\n")
            output.seek(0)
            return process.returncode, output.read()

        try:
            yield finish
        finally:
            process.kill()  # without effect if it has ended


def ask_fresh(
    finish: Finish, ours: list[SourceAnswer], scratch: Path, seen: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Returns the folder's answers to the same prompts: answers.json of fresh.py, with the logits of each answer.

    Raises:
        ConfigError: transformers alone cannot load the folder, or the folder lacks a tensor of its class.
    """
    from safetensors.torch import load_file, save_file

    pixels = {str(number): answer.pixels for number, answer in enumerate(ours) if answer.pixels is not None}
    save_file({**pixels, **(seen or {})}, scratch / "pixels.safetensors")
    status, output = finish()
    path = scratch / "answers.json"
    if status or not path.is_file():
        reason = output.strip().splitlines()[-1] if output.strip() else f"exit status {status}"
        raise ConfigError(f"transformers alone could not load the exported folder: {reason}")
    theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if theirs["unfilled"]:
        raise ConfigError(f"the exported folder does not fill transformers' class: {theirs['unfilled'][0]}.")
    logits = load_file(scratch / "logits.safetensors")
    for number, answer in enumerate(theirs["answers"]):
        answer["logits"] = logits[str(number)]
    return theirs


# -- comparing answers -------------------------------------------------------------------------------------------------


def compare_answers(
    source: Source, texts: TextSettings, ours: list[SourceAnswer], theirs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Compares all answers; returns an entry of proof.json for every prompt.

    Raises:
        ConfigError: a prompt has other tokens, logits or pixel values beyond the tolerance, or another answer.
    """
    tolerance = TOLERANCE[source.dtype]
    lines = []
    for one, other in zip(ours, theirs["answers"], strict=True):
        ids = [texts.image_token_id if token == IMAGE_TOKEN else token for token in one.ids]
        gap = _logit_difference(one, other)
        difference = None
        if ids != other["ids"]:
            difference = f"its prompt has other tokens ({len(other['ids'])}, not {len(ids)})"
        elif not other["pixel_difference"] <= PIXELS:
            difference = f"pixel values differ by {other['pixel_difference']:.2g} (at most {PIXELS} is allowed)"
        elif not gap <= tolerance:
            difference = f"logits differ by {gap:.2g} (at most {tolerance} is allowed)"
        elif one.answer != other["answer"]:
            difference = "the greedy answers are not the same"
        if difference is not None:
            raise ConfigError(
                f"the exported model differs from its source on '{one.question}' "
                f"{'with an image' if one.image else 'without an image'}, although every tensor is the same: "
                f"{difference}."
            )
        lines.append(
            {
                "question": one.question,
                "picture": one.image is not None,
                "prompt_tokens": len(ids),
                "largest_logit_difference": gap,
                "largest_pixel_difference": other["pixel_difference"],
                "answer_tokens": len(one.answer),
                "answers_equal": True,
            }
        )
    return lines


def compare_kinds(differences: dict[str, float]) -> dict[str, float]:
    """Returns the largest difference of pixel values for each kind of image, as proof.json has it.

    Raises:
        ConfigError: the folder shows its model another image than training did.
    """
    for kind, difference in differences.items():
        if not difference <= PIXELS:
            raise ConfigError(
                f"the exported folder reads a {kind} image differently from its source: pixel values differ by "
                f"{difference:.2g} (at most {PIXELS} is allowed)."
            )
    return differences


def _logit_difference(ours: SourceAnswer, theirs: dict[str, Any]) -> float:
    """Returns the largest difference between logits, up to the first token at which the answers differ."""
    one, other = ours.logits.float(), theirs["logits"].float()
    rows = min(len(one), len(other))
    prompt_rows = len(one) - (len(ours.answer) - 1)
    for place, (token, their_token) in enumerate(zip(ours.answer, theirs["answer"], strict=False)):
        if token != their_token:
            rows = min(rows, prompt_rows + place)  # after the prompt's rows there is one for each token of the answer
            break
    return float((one[:rows] - other[:rows]).abs().max())
