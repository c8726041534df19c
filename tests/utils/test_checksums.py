"""Files that carry a checksum: no byte of them can change unseen. Files of a stranger are checked for shapes and
numbers besides.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_esm import ActivationStatistics, DamagedFileError, HfEsmError
from hf_esm.calibration.statistics import Provenance
from hf_esm.data import load_samples, save_samples
from hf_esm.data.samples import sample_fingerprint
from hf_esm.merging.saved_state import SavedState
from hf_esm.methods import InputStatistics
from hf_esm.metrics.agreement import ExpertAnswers
from hf_esm.utils import UNSEALED, seal


FIXTURES = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0"


def statistics() -> ActivationStatistics:
    entries = {key: InputStatistics(torch.randn(5, 3), torch.randn(3), 7) for key in "qo"}
    pooled, counts = {"q": torch.randn(4, 3)}, {"embedding": torch.arange(6)}
    return ActivationStatistics(entries, {"q": "q", "k": "q", "o": "o"}, Provenance("me"), pooled, counts)


SAMPLES = [{"input_ids": torch.arange(i + 2), "pixel_values": torch.rand(2)} for i in range(3)]


def state(path: Path) -> SavedState:
    tensor = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.Adam([tensor])
    tensor.sum().backward()
    optimizer.step()
    return SavedState(path, {"mask": tensor}, {"adam": optimizer}, Accelerator())


def write_state(path: Path) -> None:
    state(path).save(step=3)


def write_answers(path: Path) -> None:
    answers = [{"positions": torch.arange(2), "logits": torch.randn(2, 3)} for _ in SAMPLES]
    ExpertAnswers("classes", SAMPLES, answers).save(path)


KINDS = {
    "statistics": (lambda path: statistics().save(path), ActivationStatistics.load),
    "samples": (lambda path: save_samples(SAMPLES, path), load_samples),
    "learned": (write_state, lambda path: state(path).resume()),
    "answers": (write_answers, lambda path: ExpertAnswers.load(path, SAMPLES)),
}


@pytest.mark.parametrize(("write", "read"), KINDS.values(), ids=KINDS)
def test_no_byte_changes_unseen(write, read, tmp_path):
    path = tmp_path / "file.safetensors"
    write(path)
    read(path)
    whole = path.read_bytes()
    for place in random.sample(range(len(whole)), 120):
        content = bytearray(whole)
        content[place] ^= 1 << random.randrange(8)
        path.write_bytes(content)
        with pytest.raises(HfEsmError, match=r"file\.safetensors"):
            read(path)
    path.write_bytes(whole)
    read(path)


def test_files_of_the_first_version_have_no_checksum_and_are_read():
    assert ActivationStatistics.load(FIXTURES / "statistics.safetensors").keys()
    assert load_samples(FIXTURES / "samples.safetensors")


def sealed(path: Path, **tensors: torch.Tensor | None) -> None:
    """The file with other tensors, and a good checksum, as a stranger could write it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    save_file(changed, path, metadata | UNSEALED)
    seal(path)


NAN = torch.full((3,), torch.nan)

BROKEN = {
    "a factor of another width": ("statistics", {"q.factor": torch.zeros(5, 2)}, "'q' has a factor"),
    "a factor of one row": ("statistics", {"q.factor": torch.zeros(3)}, "'q' has a factor"),
    "no factor": ("statistics", {"q.factor": None}, "header of statistics is damaged"),
    "no number in a mean": ("statistics", {"o.mean": NAN}, "'o' are not finite float32"),
    "another dtype": ("statistics", {"o.mean": torch.zeros(3).half()}, "'o' are not finite float32"),
    "infinite features": ("statistics", {"q.pooled": torch.full((4, 3), torch.inf)}, "features of 'q'"),
    "negative counts": ("statistics", {"embedding.token_counts": torch.tensor([-1])}, "token counts"),
    "no number in a sample": ("samples", {"1.pixel_values": NAN}, "pixel_values of sample 1 has NaN"),
    "a sample less": ("samples", {"1.pixel_values": None, "1.input_ids": None}, "it lacks some samples"),
    "a sample without a number": ("samples", {"x.input_ids": torch.ones(1)}, "is damaged"),
    "a mask of one element": ("learned", {"mask": torch.ones(1)}, "'mask' is no tensor of finite numbers"),
    "a mask of no numbers": ("learned", {"mask": torch.full((4,), torch.nan)}, "'mask' is no tensor of finite"),
    "momentum of another shape": ("learned", {"adam.0.exp_avg": torch.ones(5)}, "'adam.0.exp_avg' is no tensor of"),
}


@pytest.mark.parametrize(("kind", "tensors", "says"), BROKEN.values(), ids=BROKEN)
def test_shapes_and_numbers_are_checked_when_a_file_is_opened(kind, tensors, says, tmp_path):
    write, read = KINDS[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    sealed(path)
    read(path)
    sealed(path, **tensors)
    with pytest.raises(DamagedFileError, match=says):
        read(path)


def test_the_same_content_is_the_same_bytes(tmp_path):
    """Hashes of models, and version control, see no change where there is none."""
    known = statistics()
    for name in ("one", "two"):
        known.save(tmp_path / name / "statistics.safetensors")
        save_samples([dict(reversed(s.items())) for s in SAMPLES], tmp_path / name / "samples.safetensors")
    for name in ("statistics", "samples"):
        one, two = ((tmp_path / folder / f"{name}.safetensors").read_bytes() for folder in ("one", "two"))
        assert one == two
    shutil.copy(tmp_path / "one" / "samples.safetensors", tmp_path / "copied.safetensors")
    read = load_samples(tmp_path / "copied.safetensors")
    assert list(map(sample_fingerprint, read)) == list(map(sample_fingerprint, SAMPLES))
