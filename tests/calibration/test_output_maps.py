"""Output maps that are not tied to the embedding: linear maps like all others, which read the last hidden states."""

import pytest
import torch

from hf_esm.calibration import collect_statistics
from support import reference
from support.architectures import ARCHITECTURES
from support.helpers import merge, perturbed, reloaded, save, text_samples
from support.problems import relative_error


LLAMA = ARCHITECTURES["llama"]


@torch.no_grad()
def last_hidden_states(model, samples):
    """What the output map reads, one sample at a time, `[n, d]` float64."""
    return torch.cat([model.model(row["input_ids"][None]).last_hidden_state[0] for row in samples]).double()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_an_output_map_reads_the_last_hidden_states(batch_size):
    model, samples = LLAMA.build(tie_word_embeddings=False), text_samples(0)
    found = collect_statistics(model, samples, batch_size=batch_size, progress=False)
    entry, hidden = found["lm_head.weight"], last_hidden_states(model, samples)
    assert entry.count == len(hidden) and "lm_head.weight" not in found.token_counts
    assert relative_error(entry.mean, hidden.mean(0)) < 1e-5
    assert relative_error(entry.factor.double().T @ entry.factor.double(), hidden.T @ hidden) < 1e-5


def test_a_tied_output_map_has_token_counts_alone():
    found = collect_statistics(LLAMA.build(tie_word_embeddings=True), text_samples(0), progress=False)
    assert not {"lm_head.weight", "embed_tokens.weight"} & found.keys()
    assert list(found.token_counts) == ["embed_tokens.weight"]


def test_an_output_map_is_merged_as_a_linear_map(tmp_path):
    base = LLAMA.build(tie_word_embeddings=False)
    experts = [perturbed(base, 0.05, 1 + i) for i in range(2)]
    folders = [save(expert, tmp_path / f"e{i}") for i, expert in enumerate(experts)]
    merge(save(base, tmp_path / "base"), folders, LLAMA, tmp_path / "merged")
    before = base.lm_head.weight.detach().double()
    merged = reloaded(base, tmp_path / "merged").lm_head.weight.detach().double() - before
    hidden = [last_hidden_states(expert, text_samples(i)) for i, expert in enumerate(experts)]
    updates = [expert.lm_head.weight.detach().double() - before for expert in experts]
    assert relative_error(merged, reference.esm(updates, hidden)) < 1e-4
