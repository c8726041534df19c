"""The modules of Sentence Transformers models in a merge: whether they are alike, and what the merged model gets."""

from dataclasses import replace

from ..checkpoints import (
    Checkpoint,
    EmbeddingCheckpoint,
    FolderCheckpoint,
    SentenceModules,
    common_settings,
)
from ..errors import HfEsmError, IncompatibleError


def with_common_modules(
    base: Checkpoint, experts: dict[str, Checkpoint]
) -> tuple[Checkpoint, dict[str, Checkpoint], list[str]]:
    """Return the models with the modules that all of them have in the merged model, and warnings.

    An expert without modules, such as an adapter, gets those of the base. A base without modules gets those of the
    experts; where these have dense modules, the mean of their weights stands in for the base's, which nobody has, so
    that their updates are the differences from that mean.

    Raises:
        IncompatibleError: if two models pool, project or normalise in different ways.
        HfEsmError: if the base is a live model with a head, which no module can follow.
    """
    having = [model for model in (base, *experts.values()) if model.modules is not None]
    if not having:
        return base, experts, []
    first = having[0]
    for model in having[1:]:
        described, expected = model.modules.describe(), first.modules.describe()
        if described != expected:
            raise IncompatibleError(
                f"{model.title} makes embeddings by {described}, but {first.title} by {expected}. Merge models that "
                "make them alike, or their Transformers alone: `SentenceTransformer(…)[0].model`."
            )
    of_experts = {task: expert.modules for task, expert in experts.items() if expert.modules is not None}
    settings, warnings = common_settings(base.modules, of_experts)
    modules = base.modules
    if modules is None:
        one, *others = of_experts.values()
        modules = one.mean_with(others)
        warnings += _warnings_of_mean(base, modules, list(of_experts.values()))
    base = _base_with(base, replace(modules, settings=settings))
    for task, expert in experts.items():
        if expert.modules is None and type(expert.skeleton) is type(base.skeleton):
            experts = {**experts, task: EmbeddingCheckpoint(expert, base.modules)}
    return base, experts, warnings


def _warnings_of_mean(base: Checkpoint, mean: SentenceModules, every: list[SentenceModules]) -> list[str]:
    """Return a warning if the base lacks dense modules in which the experts differ."""
    if all(one.tensors[name].equal(tensor) for one in every for name, tensor in mean.tensors.items()):
        return []
    return [
        f"{base.title} has no dense modules, and those of the experts differ: the mean of their weights stands in. If "
        "each expert began with another random matrix, the merged embeddings are of little use."
    ]


def _base_with(base: Checkpoint, modules: SentenceModules) -> Checkpoint:
    """Return the base with modules, as a model of the class that they follow."""
    if base.modules is not None:
        return EmbeddingCheckpoint(base.body, modules)
    encoder = modules.encoder_class(base.config, type(base.skeleton))
    if encoder is not type(base.skeleton):
        if not isinstance(base, FolderCheckpoint):
            raise HfEsmError(
                f"{base.title} is a {type(base.skeleton).__name__}, but the experts' modules follow a "
                f"{encoder.__name__}. Pass its body, or its id or folder."
            )
        base = base.seen_as(encoder, base.config)
    return EmbeddingCheckpoint(base, modules)
