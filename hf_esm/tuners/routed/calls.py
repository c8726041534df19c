"""Checks of a whole forward pass: that it trains something, packs no samples, and runs the output map's experts."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import HfEsmError


def check_trains(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse a pass with labels in training mode where nothing can be trained: neither weights nor inputs.

    Raises:
        HfEsmError: if nothing has gradients. Experts that are loaded for inference have none.
    """
    if inputs.get("labels") is None or inputs.get("past_key_values") is not None:  # a cache may hold a trained prefix
        return
    tensors = (value for value in inputs.values() if isinstance(value, Tensor))
    if not any(tensor.requires_grad for source in (model.parameters(), tensors) for tensor in source):
        adapter = next(name for module in model.modules() for name in getattr(module, "routed_experts_A", ()))
        raise HfEsmError(
            f"This {type(model).__name__} is in training mode, and none of its weights can be trained: experts are "
            f"loaded for inference. To train them, call `set_requires_grad('{adapter}')` of the PeftModel; to score, "
            "call `eval()`."
        )


def packed_rows(inputs: Mapping[str, Any], batch: int) -> str:
    """Which input says that a row holds several samples; "" if none does.

    Args:
        inputs: of a model.
        batch: number of rows.
    """
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        lengths = inputs.get(name)
        if isinstance(lengths, Tensor) and len(lengths) - 1 > batch:
            return f"{name} counts {len(lengths) - 1} of them"
    samples, positions, mask = (inputs.get(name) for name in ("seq_idx", "position_ids", "attention_mask"))
    if isinstance(samples, Tensor) and bool((samples != samples[..., :1]).any()):
        return "seq_idx counts them"
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return ""
    again = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape[1:] == positions.shape[1:]:  # padding has any position
        again = again & mask[:, 1:].bool() & mask[:, :-1].bool()
    return "position_ids start again" if bool(again.any()) else ""


def check_output_map(model: nn.Module, read: Iterable[str]) -> None:
    """Refuse a pass of a language model that did not run the experts on the output map.

    Trainers that never compute all logits at once read the map's weight themselves.

    Args:
        model: has run.
        read: names of modules that ran.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not getattr(head, "routed_experts_A", None) or head.disable_adapters or head.name in read:
        return
    raise HfEsmError(
        f"'{head.name}' has experts, and this pass did not run them: a trainer with a fused loss (trl, Liger) reads "
        "the weight alone. Use Transformers' Trainer without such a loss, or merge with experts on other linear maps: "
        "`method={'name': 'esm++', 'targets': ['layers']}`."
    )
