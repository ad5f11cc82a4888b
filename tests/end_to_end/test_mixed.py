"""Text alongside images in every arrangement over two ranks: no hang, and the numbers of a single rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from places import GATHERED
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig

STEPS = {"pretrain": 64, "encoder": 32}
"""The first stage mixes text with images; in the second, each arrangement comes twice."""
LONG = {"pretrain": 200, "encoder": 48}


@pytest.fixture(scope="module")
def arranged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 64 samples: 16 steps of four hold every arrangement of text and images over ranks and passes."""
    folder = tmp_path_factory.mktemp("arranged")
    mixed = json.loads(tiny.write_data(folder, images=32, texts=32).read_text())
    images = iter([record for record in mixed if "image" in record])
    texts = iter([record for record in mixed if "image" not in record])
    records = [next(images if step >> place & 1 else texts) for step in range(16) for place in range(4)]
    path = folder / "arranged.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("stage", "last"),
    [
        *STEPS.items(),
        *(
            pytest.param(stage, last, marks=pytest.mark.slow(reason="the same arrangements, more often"))
            for stage, last in LONG.items()
        ),
    ],
)
def test_every_arrangement_runs_and_learns_the_same(
    run_config: Callable[..., RunConfig], trained: Path, arranged: Path, tmp_path: Path, stage: str, last: int
) -> None:

    def config(ranks: int) -> RunConfig:
        return run_config(
            stage,
            tmp_path / str(ranks),
            zero=GATHERED if ranks > 1 else "zero0",
            data={"sources": [{"path": str(arranged)}], "max_length": 512, "system_prompt": ""},
            init_from=[str(trained / "pretrain")],
            optimizer={"learning_rate": 1e-3},
            max_steps=last,
            activation_checkpointing=stage == "encoder",
        )

    for ranks in (1, 2):
        assert run_ranks(train_all, ranks, [config(ranks)]) == [[f"step-{last:06d}"]] * ranks
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / ranks / "metrics.jsonl").read_text().splitlines()]
        for ranks in "12"
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert sum(curves[0][-16:]) < sum(curves[0][:16]), "it learns"
    one, two = (load_file(tmp_path / ranks / f"step-{last:06d}" / "weights.safetensors") for ranks in "12")
    for name, tensor in one.items():
        if not name.endswith("k_proj.bias"):  # they do not change a softmax, so Adam amplifies rounding noise
            torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
