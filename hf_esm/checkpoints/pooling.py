"""What a Sentence Transformers model does after its Transformer: pooling, dense layers, norms, normalisation."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..architecture import SENTENCE_MODULES
from ..data import PROMPT_MASK, Prompt


EMBEDDING = "sentence_embedding"

# How older versions of the library write a mode of pooling, in the order in which several are joined.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_modes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modes of a `Pooling` module, whose results are joined, from its config of any version."""
    modes = settings.get("pooling_mode") or [mode for key, mode in _OLD_MODES.items() if settings.get(key)] or "mean"
    return (modes,) if isinstance(modes, str) else tuple(modes)


def pool(tokens: Tensor, mask: Tensor, modes: tuple[str, ...], prompt: Optional[Tensor] = None) -> Tensor:
    """Return one vector per text, `[B, len(modes) d]`.

    Args:
        tokens: `[B, L, d]`.
        mask: `[B, L]`, 0 for padding.
        modes: as `pooling_modes` returns them.
        prompt: `[B, L]`, 1 for tokens that are left out; places of the others count from the first real token.

    Raises:
        KeyError: for a mode that is not known.
    """
    start = mask.int().argmax(1)
    mask = mask if prompt is None else mask * (1 - prompt).to(mask.dtype)
    precise = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    real, rows = mask.to(precise.dtype)[..., None], torch.arange(len(tokens), device=tokens.device)
    places = torch.arange(1, mask.shape[1] + 1, device=tokens.device)
    first = mask.int().argmax(1)
    weights = real * (places - start[:, None])[..., None]
    total, count = (precise * real).sum(1), real.sum(1).clamp_min(1e-9)
    pooled = {
        "cls": lambda: precise[rows, first],
        "max": lambda: precise.masked_fill(real == 0, -torch.inf).amax(1),
        "mean": lambda: total / count,
        "mean_sqrt_len_tokens": lambda: total / count.sqrt(),
        "weightedmean": lambda: (precise * weights).sum(1) / weights.sum(1).clamp_min(1e-9),
        "lasttoken": lambda: precise[rows, (mask * places).argmax(1)],
    }
    return torch.cat([pooled[mode]() for mode in modes], 1).to(tokens.dtype)


class Pooling(nn.Module):
    """Pools the tokens' vectors, prompts with the text unless the settings leave them out."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.modes = pooling_modes(settings)
        self.include_prompt = settings.get("include_prompt", True)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        prompt = None if self.include_prompt else features.get(PROMPT_MASK)
        return {EMBEDDING: pool(features["token_embeddings"], features["attention_mask"], self.modes, prompt)}


class Dense(nn.Module):
    """A linear map and its activation, with the names of weights that the library stores."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        inputs, outputs = settings["in_features"], settings["out_features"]
        self.linear = nn.Linear(inputs, outputs, bias=settings.get("bias", True))
        self.activation = activation_of(settings)()
        self.residual = nn.Identity() if settings.get("use_residual") else None
        if self.residual is not None and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)
        self.reads, self.writes = names_of(settings)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = features[self.reads].to(self.linear.weight.dtype)
        outputs = self.activation(self.linear(inputs))
        return {self.writes: outputs if self.residual is None else outputs + self.residual(inputs)}


class LayerNorm(nn.Module):
    """A norm of the embedding, with the names of weights that the library stores."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.norm = nn.LayerNorm(settings["dimension"])

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {EMBEDDING: self.norm(features[EMBEDDING].to(self.norm.weight.dtype))}


class Normalize(nn.Module):
    """Brings the embedding to length 1."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.reads, self.writes = names_of(settings)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.writes: normalize(features[self.reads], dim=-1)}


KINDS = {kind.__name__: kind for kind in (Pooling, Dense, LayerNorm, Normalize)}


def names_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of what a module reads and writes."""
    reads = settings.get("module_input_name") or EMBEDDING
    return reads, settings.get("module_output_name") or reads


def activation_of(settings: Mapping[str, Any]) -> Optional[type[nn.Module]]:
    """Return the class of a dense module's activation; None if it is not one of PyTorch."""
    path = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    found = getattr(nn, path.rpartition(".")[2], None) if path.startswith("torch.nn.") else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


class SentenceHead(nn.Module):
    """The modules after a Transformer, each under the name of its folder.

    Attributes:
        output: name of the Transformer's output that is read.
        feature: name that the modules know it by.
        complete: whether all modules are known, so that embeddings can be computed.
        default_prompt: what is put before texts by default.
        prompt: `[B, L]`, 1 for tokens of the prompts in the batch that the model reads; None without any.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], output: str, feature: str, complete: bool, default_prompt: Prompt
    ):
        super().__init__()
        self.default_prompt = default_prompt
        self.output, self.feature, self.complete = output, feature, complete
        self.prompt: Optional[Tensor] = None
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, output: Mapping[str, Tensor], mask: Optional[Tensor]) -> Optional[Tensor]:
        """Return `[B, d]` embeddings; None if the modules make none."""
        hidden = output[self.output]
        if mask is None or mask.shape != hidden.shape[:2]:
            mask = hidden.new_ones(hidden.shape[:2], dtype=torch.int64)
        features = {self.feature: hidden, "attention_mask": mask}
        if self.prompt is not None:
            features[PROMPT_MASK] = self.prompt.to(hidden.device)
        for module in self.children():
            features |= module(features)
        return features.get(EMBEDDING)


def prompt_before(model: PreTrainedModel) -> Prompt:
    """Return what a model, or a skeleton, reads before texts by default."""
    head = getattr(model, SENTENCE_MODULES, None)
    return Prompt() if head is None else head.default_prompt


def attach(model: PreTrainedModel, head: SentenceHead) -> PreTrainedModel:
    """Put the modules behind a Transformer: its output gets the `sentence_embedding` that they make. The hooks of
    models that share their parts with it stay as they are.
    """
    model.add_module(SENTENCE_MODULES, head)
    for hooks in _HOOKS:
        setattr(model, hooks, OrderedDict(getattr(model, hooks)))
    model.register_forward_pre_hook(_take_prompt, with_kwargs=True)
    if head.complete:
        model.register_forward_hook(_embed, with_kwargs=True)
    return model


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _take_prompt(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Keep the places of prompts for the modules: the Transformer does not read them."""
    getattr(model, SENTENCE_MODULES).prompt = kwargs.pop(PROMPT_MASK, None)
    return args, kwargs


def _embed(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    head = getattr(model, SENTENCE_MODULES)
    if isinstance(output, Mapping) and head.output in output:
        embedding = head(output, kwargs.get("attention_mask"))
        if embedding is not None:
            output[EMBEDDING] = embedding
    return output
