"""Images in tiles have as many image tokens as tiles, in training, packing and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_helper
import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from PIL import Image
from test_engine import apart, engine_run

from zero_ds.config.schema import AdapterConfig, DataConfig, EncoderConfig, RunConfig, SourceConfig
from zero_ds.data.conversations import IMAGE_TOKEN, PLACEHOLDER, Turn
from zero_ds.data.sources import Records, Sample
from zero_ds.grafting.generate import Answerer, Query
from zero_ds.model.build import ModelSpec, build_model, sample_encoder
from zero_ds.runtime.errors import ConfigError

GRID = [[1, 2], [2, 1], [2, 2]]
SIZES = [(64, 64), (64, 32), (32, 32), (20, 90)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with four images of noise in the sizes above, a sample about each and one about two of them."""
    root = tmp_path_factory.mktemp("tiles")
    rng = random.Random(0)
    for number, size in enumerate(SIZES):
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(root / f"{number}.png")
    records = [tiny.record(str(n), [("what is it?", "a star.")], f"{n}.png") for n in range(len(SIZES))]
    both = tiny.record("both", [("<image> or <image>?", "the first.")])
    (root / "data.json").write_text(json.dumps([*records, {**both, "image": ["0.png", "2.png"]}, *records[:3]]))
    return root


def data_of(images: Path, **more: Any) -> dict[str, Any]:
    source = {"path": str(images / "data.json")}
    return {"sources": [source], "max_length": 200, "system_prompt": "", "image_grid": GRID, **more}


@pytest.fixture(scope="module")
def parts(made: Callable[..., Path], images: Path) -> Any:
    target, clip = made("llama", tied=True), made("clip")
    encoder = EncoderConfig(path=str(clip))
    model = build_model(ModelSpec(target, encoder=clip, encoder_config=encoder, adapter_config=AdapterConfig())).eval()
    return model, sample_encoder(model, target, clip, DataConfig.model_validate(data_of(images)))


def test_image_tokens_follow_the_tiles(parts: Any, images: Path) -> None:
    model, encoder = parts
    views = [5, 3, 1, 3, 6]
    for sample, count in zip(list(Records([SourceConfig(path=str(images / "data.json"))]))[:5], views, strict=True):
        encoded = encoder(sample)
        assert encoded.pixels.shape[0] == count
        assert encoded.input_ids.count(IMAGE_TOKEN) == count * model.tokens_per_image()


def test_packed_and_padded_learn_the_same(run_config: Callable[..., RunConfig], images: Path) -> None:
    def config(**more: Any) -> RunConfig:
        return run_config("encoder", data=data_of(images, **more), global_batch=8, micro_batch=2, zero="zero3")

    (plain, packed), (other, _) = run_ranks(engine_run, 2, [config(), config(packing=True)])
    for runs in ((plain, packed), (plain, other)):
        left, right = (
            torch.cat([g.flatten() for _, g in sorted(run["steps"][0]["gradients"].items())]) for run in runs
        )
        assert apart(left, right) < 5e-6
        assert runs[0]["steps"][0]["loss"] == pytest.approx(runs[1]["steps"][0]["loss"], rel=1e-6)


@torch.no_grad()
def test_answers_are_the_plain_greedy_ones(parts: Any, images: Path) -> None:
    model, encoder = parts
    paths = [str(images / f"{n}.png") for n in range(len(SIZES))]
    asked = [("a", (0,)), ("b", (1,)), ("c", (2,)), ("d", (3,)), ("e", (0, 2)), ("f", ())]
    queries = [Query(name, (Turn("user", PLACEHOLDER * len(shown) + " what?"),), shown) for name, shown in asked]
    answerer = Answerer(model, encoder, batch_size=4, max_new_tokens=6)
    replies = answerer.examine(queries, answerer.features(paths))
    stop = encoder.template.end_of_turn()
    for query, reply in zip(queries, replies, strict=True):
        sample = Sample(query.id, query.turns, tuple(paths[i] for i in query.images))
        tokens = encoder.image_tokens(sample)
        ids = list(encoder.encode(encoder.turns(sample), generate=True, image_tokens=tokens).input_ids)
        spoken: list[int] = []
        while len(spoken) < 6:
            embeddings = model.embed(torch.tensor([ids + spoken]), encoder.pixels(sample) if sample.images else None)
            token = int(model.decoder(inputs_embeds=embeddings, use_cache=False).logits[0, -1].argmax())
            if token == stop:
                break
            spoken.append(token)
        assert reply.text == encoder.template.tokenizer.decode(spoken, skip_special_tokens=True).strip(), query.id


def test_a_run_with_tiles_is_exported_with_code_alone(
    run_config: Callable[..., RunConfig],
    made: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zero_ds.export import export_model

    config = run_config("encoder", tmp_path / "run", data=data_of(images), max_steps=2, zero="zero3")
    assert run_ranks(train_all, 2, [config]) == [["step-000002"]] * 2
    with pytest.raises(ConfigError, match=r"this run was trained with data\.image_grid"):
        export_model(tmp_path / "run", None, tmp_path / "export", form="llava")
    assert not (tmp_path / "export").exists()
    export_helper.here(monkeypatch)
    proof = export_model(tmp_path / "run", None, tmp_path / "export", form="remote-code")
    assert proof["largest_logit_difference"] <= 1e-5
