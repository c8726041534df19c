"""A tiny BERT and experts of it on disk, as users have them: full weights, a LoRA adapter, a tokenizer, text."""

import json
import random
from pathlib import Path
from typing import Any, Optional

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from support.helpers import perturbed
from support.tiny import WORDS, save_tokenizer


LABELS = {"a": ["no", "yes"], "b": ["cold", "mild", "hot"], "c": ["left", "right", "up", "down"]}
HEADS = {**LABELS, "sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"]}


def texts(seed: int, count: int = 9) -> list[str]:
    """Texts of differing lengths."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 14))) for _ in range(count)]


def base_model(vocabulary: int = 64) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    return perturbed(BertModel(config).eval(), 0.2, 0)


def classifier(base: BertModel, task: str) -> BertForSequenceClassification:
    """The base with a fresh head for the labels of one task."""
    config = BertConfig.from_dict({**base.config.to_dict(), "id2label": dict(enumerate(HEADS[task]))})
    config.label2id = {label: i for i, label in config.id2label.items()}
    torch.manual_seed(len(task))
    model = BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(base.state_dict())
    return model


def lora_adapter(base: BertModel, task: str, base_name: str, seed: int = 7) -> Any:
    """A LoRA expert with rank and update of its own."""
    model = classifier(base, task)
    model.name_or_path = base_name
    adapted = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def write_models(folder: Path, vocabulary: int = 64, base_name: Optional[str] = None) -> Path:
    """`base`, the experts `a`, `b` and `c`, and `c-lora`; each but the adapter with the tokenizer."""
    base = base_model(vocabulary)
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(LABELS, start=1):
        perturbed(classifier(base, task), 0.05, seed).save_pretrained(folder / task)
    for name in ("base", *LABELS):
        save_tokenizer(folder / name)
    lora_adapter(base, "c", base_name or str(folder / "base")).save_pretrained(
        folder / "c-lora", save_embedding_layers=False
    )
    return folder


def write_rows(path: Path, rows: list[Any]) -> str:
    """A JSON-lines file of texts, or of rows."""
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in Path(folder).glob("model*.safetensors") for k, v in load_file(path).items()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any weight; infinite where the names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    errors = [(found[name].double() - w.double()).norm() / w.double().norm() for name, w in expected.items()]
    return float(max(errors))
