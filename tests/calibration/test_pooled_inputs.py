"""The features of samples that a router is made from."""

import math

import pytest
import torch

from hf_esm.architecture import canonical_names
from hf_esm.calibration import pooled_inputs
from support.helpers import Architecture
from support.tiny import BERT, GPT2, LLAMA


READERS = {"llama": (LLAMA, "self_attn.q_proj"), "gpt2": (GPT2, "attn.c_attn"), "bert": (BERT, "self.query")}


def samples(count: int = 5) -> list[dict[str, torch.Tensor]]:
    """Texts of 1 to 17 tokens."""
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(5, 20, (1 + 4 * i,), generator=generator)} for i in range(count)]


@torch.no_grad()
def literal(model: torch.nn.Module, module: str, ids: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of what a module reads of one text."""
    read = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: read.append(args[0][0].double()))
    model(input_ids=ids[None])
    handle.remove()
    return read[0].mean(0)


@pytest.mark.parametrize(("architecture", "reader"), READERS.values(), ids=READERS)
def test_features_are_means_of_samples_and_for_models_that_read_prompts_of_their_beginnings(
    architecture: Architecture, reader: str
):
    """The beginnings of a text are read as if they were the whole of it."""
    model = architecture.build().eval()
    found = pooled_inputs(model, samples(), batch_size=2, progress=False)
    live = {name: at.removesuffix(".weight") for name, at in canonical_names(model).items()}
    assert len(found) == len([name for name in live if name.endswith(f"{reader}.weight")]) > 0
    for name, rows in found.items():
        assert live[name].endswith(reader)
        for row, sample in zip(rows, samples(), strict=True):
            ids = sample["input_ids"]
            shares = [1] if architecture is BERT else [1 / 8, 1 / 4, 1 / 2, 1]
            beginnings = [ids[: math.ceil(share * len(ids))] for share in shares]
            expected = torch.stack([literal(model, live[name], part) for part in beginnings])
            assert torch.allclose(row.double(), expected[0] if architecture is BERT else expected, atol=1e-6)
