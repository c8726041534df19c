"""Experts that differ from their base in linear maps alone, so that routed experts of full rank give them back, on
texts that tell the tasks apart; and the ESM++ models made of them.
"""

import copy
import functools
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm import merge_models
from support import reference
from support.helpers import Architecture, token_inputs
from support.problems import relative_error
from support.tiny import BERT, WORDS, save_tokenizer
from support.toys import base_model, classifier


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
VIT = Architecture("ViTModel", SMALL | {"image_size": 16, "patch_size": 4})
FULL = 64  # a rank above all widths
# Of full rank, such experts give what they gave as models.
EXACT = {"name": "esm++", "expert_directions": "residual"}
quiet = functools.partial(merge_models, progress=False, method=EXACT)


def task_texts(task: str, seed: int = 0, count: int = 16) -> list[str]:
    """Texts of the task's own five words, of differing lengths."""
    generator = torch.Generator().manual_seed(100 * "abc".index(task) + seed)
    own = WORDS["abc".index(task) * 5 :][:5]
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    return [" ".join(own[i] for i in torch.randint(5, (n,), generator=generator)) for n in lengths]


def task_ids(task: str, seed: int = 0, count: int = 16) -> list[dict[str, Tensor]]:
    """The same as ready inputs of a model of `VOCABULARY` tokens."""
    words = {word: 5 + i for i, word in enumerate(WORDS)}
    return [{"input_ids": torch.tensor([words[w] for w in t.split()])} for t in task_texts(task, seed, count)]


@torch.no_grad()
def tuned(model: PreTrainedModel, seed: int, scale: float = 0.15) -> PreTrainedModel:
    """A copy with noise on the weights of its linear maps."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            module.weight.add_(scale * torch.randn(module.weight.shape, generator=generator))
    return model


def expert(task: str) -> PreTrainedModel:
    return tuned(classifier(base_model(), task), 1 + "abc".index(task))


def write_bert(folder: Path) -> Path:
    """`base`, and the classifiers `a`, `b` and `c` with 2, 3 and 4 labels, each with its tokenizer."""
    base_model().save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    for task in "abc":
        expert(task).save_pretrained(folder / task)
        save_tokenizer(folder / task)
    return folder


def merge_bert(folder: Path, output: Path, tasks: str = "ab", **options: Any) -> Path:
    """An ESM++ merge of what `write_bert` wrote."""
    arguments = {"calibration": {task: task_texts(task) for task in tasks}, "rank": FULL, **options}
    return quiet(folder / "base", {task: folder / task for task in tasks}, output_dir=output, **arguments).output_dir


def adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's routed adapter, by their names in the static model."""
    stored = load_file(Path(folder) / "routed" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def encoded(texts: list[str]) -> list[dict[str, Tensor]]:
    """As the tokenizer encodes them."""
    return [{"input_ids": torch.tensor([2, *(5 + WORDS.index(word) for word in text.split()), 3])} for text in texts]


@functools.cache
def inputs(task: str) -> dict[str, Tensor]:
    """`X` of every linear map of an expert on its calibration texts, one by one."""
    return token_inputs(expert(task), encoded(task_texts(task)), BERT)


@torch.no_grad()
def logits(model: PreTrainedModel, samples: list[dict[str, Tensor]]) -> Tensor:
    """Of samples one by one."""
    return torch.cat([model(**{name: value[None] for name, value in s.items()}).logits for s in samples])


def assert_expert(
    a: Tensor, b: Tensor, x: Tensor, residual: Tensor, rank: int, update: Optional[Tensor] = None
) -> None:
    """`B` are leading essential directions, of the update or the residual, and `A` the residual's coordinates."""
    directions, *_ = reference.esd(x, residual if update is None else update, rank)
    assert a.shape[0] == b.shape[1] == rank
    assert relative_error(b.double() @ a.double(), directions @ directions.T @ residual) < 1e-4
    kept = b.norm(dim=0) > 0
    assert int(kept.sum()) == directions.shape[1]
    assert torch.allclose(b.T @ b, torch.diag(kept.float()), atol=1e-5)
