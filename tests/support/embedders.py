"""Tiny models of Sentence Transformers, written without the library, and their embeddings by hand."""

import json
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from support.helpers import perturbed
from support.tiny import BERT, SENTENCES, WORDS, save_tokenizer


TEXTS = [*SENTENCES, "not so good", "the plot is so dull it was not fine"]
NAMES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
OLD_PLACE = "sentence_transformers.models"


def texts_of(seed: int, count: int = 12) -> list[str]:
    """Texts of a few words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def write_embedder(
    folder: Path,
    seed: int = 0,
    pooling: str | list[str] = "mean",
    dense: Optional[str] = "Tanh",
    normalised: bool = True,
    prompts: Optional[dict[str, str]] = None,
    old: bool = False,
    **transformer: Any,
) -> Path:
    """A BERT with its tokenizer, and modules after it; seed 0 is the base.

    Args:
        pooling: mode, or several.
        dense: activation of a dense module, or None for none.
        old: write the model into `0_Transformer`, and configs, with the keys and places of years ago.
        transformer: settings of the Transformer module.
    """
    inside = "0_Transformer" if old else ""
    bare = BERT.build("BertModel")
    model = perturbed(bare, 0.05, seed) if seed else bare
    model.save_pretrained(folder / inside)
    save_tokenizer(folder / inside)
    place = OLD_PLACE if old else "sentence_transformers.sentence_transformer.modules"
    modules, width = [("Transformer", inside, None)], 16
    if old:
        config = {"word_embedding_dimension": 16} | {key: mode in pooling for mode, key in NAMES.items()}
    else:
        config = {"embedding_dimension": 16, "pooling_mode": pooling, "include_prompt": True}
    modules.append(("Pooling", "1_Pooling", config))
    if dense:
        width = 16 if isinstance(pooling, str) else 16 * len(pooling)
        config = {"in_features": width, "out_features": 8, "bias": True, "activation_function": f"torch.nn.{dense}"}
        modules.append(("Dense", "2_Dense", config))
    if normalised:
        modules.append(("Normalize", f"{len(modules)}_Normalize", {}))
    listed = []
    for i, (kind, path, config) in enumerate(modules):
        listed.append({"idx": i, "name": str(i), "path": path, "type": f"{place}.{kind}"})
        if config:
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(config))
    if dense:
        start = dense_weights(0, width)
        noise = dense_weights(seed, width)
        tensors = {name: start[name] + (0.3 * noise[name] if seed else 0) for name in start}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / inside / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, **transformer}))
    if old:
        (folder / "config.json").write_text(json.dumps({"__version__": "0.2.0"}))
    else:
        settings = {"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def dense_weights(seed: int, width: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(50 + seed)
    weight, bias = torch.randn(8, width, generator=generator), torch.randn(8, generator=generator)
    return {"linear.weight": weight / 4, "linear.bias": bias / 4}


@torch.no_grad()
def token_states(folder: Path, texts: list[str], body: Optional[dict[str, Tensor]] = None) -> list[Tensor]:
    """`[L, d]` float64 of each text alone, by the model in a folder, with other weights if they are given."""
    place = next(path for path in (folder / "0_Transformer", folder) if (path / "tokenizer.json").is_file())
    model, tokenizer = AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    model.load_state_dict(body or {}, strict=False)
    return [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].double() for t in texts]


def pooled(states: list[Tensor], *modes: str) -> Tensor:
    """`[N, d]` of the tokens of each text, several modes side by side."""
    of_mode = {
        "cls": lambda tokens: tokens[0],
        "max": lambda tokens: tokens.max(0).values,
        "mean": lambda tokens: tokens.mean(0),
        "mean_sqrt_len_tokens": lambda tokens: tokens.sum(0) / len(tokens) ** 0.5,
        "weightedmean": lambda tokens: sum((i + 1) * t for i, t in enumerate(tokens)) / sum(range(len(tokens) + 1)),
        "lasttoken": lambda tokens: tokens[-1],
    }
    return torch.stack([torch.cat([of_mode[mode](tokens) for mode in modes]) for tokens in states])


def projected(vectors: Tensor, dense: dict[str, Tensor]) -> Tensor:
    return (vectors @ dense["linear.weight"].double().T + dense["linear.bias"].double()).tanh()


def embeddings_by_hand(folder: Path, texts: list[str], *modes: str) -> Tensor:
    """`[N, d]` float64 of length 1, from the files of a folder alone."""
    vectors = pooled(token_states(folder, texts), *modes)
    if (folder / "2_Dense").is_dir():
        vectors = projected(vectors, load_file(folder / "2_Dense" / "model.safetensors"))
    return vectors / vectors.norm(dim=1, keepdim=True)


def mean_of(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of the tensors in several files."""
    files = [load_file(path) for path in paths]
    return {name: torch.stack([file[name] for file in files]).mean(0) for name in files[0]}


def copy_without_modules(folder: Path, output: Path) -> Path:
    """The Transformer of a model alone."""
    ignored = shutil.ignore_patterns("modules.json", "*_*", "config_sentence_transformers.json")
    shutil.copytree(folder, output, ignore=ignored)
    for name in ("tokenizer_config.json",):
        shutil.copy(folder / name, output)
    return output
