"""Models that are recorded once, by `torch.export`, ONNX or `torch.jit.trace`, and run on batches of other shapes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_esm.tuners.routed.model import route
from support.routed import RANK, TASKS, loaded, write_cases


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # PyTorch's, of what it cannot record

cases = pytest.fixture(write_cases, scope="module")
BATCH, LENGTH = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=40)


class Logits(nn.Module):
    """A model of two tensors that returns one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def batches_of(case: SimpleNamespace) -> list[tuple[Tensor, Tensor]]:
    """Batches of several shapes: with padding and without, of fewer tokens than experts have ranks."""
    ids, mask = case.batch["input_ids"], case.batch["attention_mask"].long()
    assert RANK > 2
    shapes = [ids.shape, (3, ids.shape[1]), (5, 2), (2, 3)]
    return [(ids[:b, :n].contiguous(), mask[:b, :n].contiguous()) for b, n in shapes]


def assert_recorded(model: nn.Module, record, cases: SimpleNamespace, task=None) -> None:
    """What is recorded on one batch gives what the model gives on all."""
    batches = batches_of(cases)
    whole = Logits(model)
    with torch.no_grad():
        with route(model, task) if task else nullcontext():
            expected = [whole(*batch) for batch in batches]
            run = record(whole, batches[2])
        if task:  # the route is in the record
            assert not torch.allclose(whole(*batches[0]), expected[0], atol=1e-3)
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(run(*batch), logits, rtol=1e-4, atol=1e-5)


def exported(strict: bool):
    def record(model, batch):
        shapes = {name: {0: BATCH, 1: LENGTH} for name in ("input_ids", "attention_mask")}
        return torch.export.export(model, batch, dynamic_shapes=shapes, strict=strict).module()

    return record


@pytest.mark.cases(1)
@pytest.mark.parametrize(("task", "strict"), [(None, False), (TASKS[1], True)])
def test_an_exported_model_gives_the_same_on_batches_of_other_shapes(cases, task, strict):
    assert_recorded(loaded(cases["bert"], "discriminant"), exported(strict), cases["bert"], task)


@pytest.mark.parametrize(("router", "task"), [("discriminant", None), ("prototype", None), ("prototype", TASKS[2])])
def test_a_traced_model_gives_the_same_on_batches_of_other_shapes(cases, router, task, monkeypatch):
    monkeypatch.setattr("hf_esm.tuners.routed.layer.TURN_BYTES", 0)  # experts that samples share pay at once
    assert_recorded(loaded(cases["bert"], router), torch.jit.trace, cases["bert"], task)


@pytest.mark.extras
def test_a_model_in_onnx_gives_the_same_on_batches_of_other_shapes(cases, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="`make test-extras` installs it")

    def record(model, batch):
        shapes = {name: {0: BATCH, 1: LENGTH} for name in ("input_ids", "attention_mask")}
        path = tmp_path / "model.onnx"
        torch.onnx.export(model, batch, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(path)
        names = [given.name for given in session.get_inputs()]
        return lambda *inputs: torch.tensor(
            session.run(None, dict(zip(names, (part.numpy() for part in inputs), strict=True)))[0]
        )

    assert_recorded(loaded(cases["bert"], "discriminant"), record, cases["bert"])
