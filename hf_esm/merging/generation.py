"""Settings of generation of a merged model: whose they are, and where a turn ends."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ..checkpoints import GENERATION_CONFIG, ModelSource, read_config
from ..planning import BASE, MergePlan, tokenizer_of
from ..utils import reading


def merged_generation(
    plan: MergePlan, sources: Mapping[str, ModelSource], processors: Mapping[str, Any]
) -> GenerationConfig:
    """Return the settings of the model whose chat template is written, in the tokens of the merged model.

    Generation ends at every token that ends the answers of an expert, or of that model.

    Args:
        processors: by task, and of the base as `"base"`.
    """
    settings = {name: _settings_of(source, sources[BASE]) for name, source in sources.items()}
    config = copy.deepcopy(settings[plan.voice])
    for name, value in vars(config).items():
        if name.endswith("_token_id") and value is not None:
            setattr(config, name, _translated(plan, plan.voice, value))
    ends: list[int] = []
    for name in dict.fromkeys([plan.voice, *plan.experts]):
        own = settings[name].eos_token_id
        tokenizer = tokenizer_of(processors[name])
        last = getattr(tokenizer, "eos_token_id", None) if own is not None else None
        for token in [*(own if isinstance(own, list) else [own]), last]:
            merged = _translated(plan, name, token)
            if merged is not None and merged not in ends:
                ends.append(merged)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return config


def _settings_of(source: ModelSource, base: ModelSource) -> GenerationConfig:
    """Return the generation settings of a model; those of the base for an adapter without any."""
    if source.model is not None:
        return getattr(source.model, "generation_config", None) or GenerationConfig()
    if (path := source.folder / GENERATION_CONFIG).is_file():
        with reading(path, f"{source.title}: {path}"):
            return GenerationConfig.from_pretrained(source.folder)
    if source.is_adapter:
        return _settings_of(base, base)
    # Older models keep them in config.json.
    config = read_config(source.folder, source.title, source.access.trust_remote_code)
    return GenerationConfig.from_model_config(config)


def _translated(plan: MergePlan, name: str, token: Any) -> Any:
    """Return the id of a model's token, or the ids of several, in the merged model; None if the token is left out."""
    if isinstance(token, list):
        return [merged for one in token if (merged := _translated(plan, name, one)) is not None]
    if plan.vocabulary is None or token is None:
        return token
    ids = _ids(plan, name)
    found = int(ids[token]) if 0 <= token < len(ids) else -1
    return found if found >= 0 else None


def _ids(plan: MergePlan, name: str) -> Tensor:
    return plan.vocabulary.tokens[name].ids
