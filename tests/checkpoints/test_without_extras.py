"""Without Pillow, which `setup.py` does not install: only images need it, and say so. See also `test_package.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.architectures import ARCHITECTURES
from support.helpers import save
from support.tiny import BERT, save_tokenizer


TESTS = Path(__file__).parents[1]
NEEDS_PILLOW = "data: sample 0 holds an image, and reading images needs Pillow: pip install pillow"
NO_TOKENIZER = "data: sample 0: there is no tokenizer or processor beside the model to encode it with"
EXPECTED = {
    ("text", "ids"): "calibrated",
    ("text", "texts"): "calibrated",
    ("text", "image"): NEEDS_PILLOW,
    ("bare", "ids"): "calibrated",
    ("bare", "texts"): NO_TOKENIZER,
    ("bare", "image"): NEEDS_PILLOW,
    ("images", "image"): NEEDS_PILLOW,
    ("images", "pixels"): "calibrated",
}
CALIBRATE = """
import json, sys
sys.modules.update(dict.fromkeys(["PIL", "matplotlib", "sklearn"]))  # importing one of them raises ModuleNotFoundError
import numpy, torch
from hf_esm import HfEsmError, calibrate

data = {"ids": [{"input_ids": [5, 6, 7]}], "texts": ["the film was good"]}
data = {**data, "image": [numpy.zeros((20, 20, 3), "uint8")], "pixels": [{"pixel_values": torch.zeros(3, 16, 16)}]}
outcomes = []
for model, kind in json.loads(sys.argv[1]):
    try:
        outcomes.append("calibrated" if calibrate(model, data[kind], progress=False) else "no statistics")
    except HfEsmError as error:
        outcomes.append(str(error))
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A process in which the libraries cannot be imported, and which calibrated models on all kinds of data."""
    folder = tmp_path_factory.mktemp("models")
    for name, architecture in {"text": BERT, "bare": BERT, "images": ARCHITECTURES["vit"]}.items():
        save(architecture.build(), folder / name)
    save_tokenizer(folder / "text")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "images" / "preprocessor_config.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", CALIBRATE, json.dumps(list(EXPECTED))],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_only_images_need_the_library_that_reads_images(process):
    outcomes = dict(zip(EXPECTED, json.loads(process.stdout), strict=True))
    assert {case: said for case, said in outcomes.items() if not said.startswith(EXPECTED[case])} == {}


@pytest.mark.slow
def test_a_processor_that_nothing_needs_is_not_mentioned(process):
    assert "Pillow" not in process.stderr and "processor" not in process.stderr
