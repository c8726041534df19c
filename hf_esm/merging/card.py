"""The model card of a merge: the plan as plain values for the template."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import ADAPTER_CONFIG, CARD_FILE, REFINED_FOLDER, Checkpoint, LiveCheckpoint, ModelSource
from ..hub import pipeline_of, template
from ..planning import BASE
from ..utils import markdown_text, plain_text
from ..version import __version__
from .contest import STANDING_COLUMNS
from .result import MergeResult


def write_card(folder: Path, result: MergeResult, sources: Mapping[str, ModelSource], num_samples: list[int]) -> None:
    """Write `README.md`: what was merged and how, how to load the model, licence and limits.

    Args:
        sources: the models by task; the base is `"base"`.
        num_samples: number of samples of each expert that was calibrated.
    """
    plan = result.plan
    licences = set(plan.licences.values())
    task_heads = [task for task, head in plan.heads.by_task.items() if head]
    adapter = (folder / ADAPTER_CONFIG).is_file()
    named = [source.repo_id for name, source in sources.items() if source.repo_id and (name == BASE or not adapter)]
    library = "sentence-transformers" if plan.base.modules else "transformers"
    data = ModelCardData(
        base_model=named or None,
        base_model_relation=("adapter" if adapter else "merge") if named else None,
        library_name="peft" if adapter else library,
        pipeline_tag="sentence-similarity" if plan.base.modules and not adapter else None,
        license=licences.pop() if len(licences) == 1 and "not stated" not in licences else None,
        tags=["merge", "hf_esm", plan.method.name],
    )
    card = ModelCard.from_template(
        data,
        template_str=template("merged.md"),
        base=_named(plan.base),
        base_revision=plan.base.revision,
        experts=[
            {
                "task": task,
                "source": _named(expert),
                "revision": expert.revision,
                "kind": expert.kind,
                "licence": markdown_text(plan.licences.get(task, "not stated")),
                "labels": list(map(markdown_text, expert.config.id2label.values()))
                if plan.heads.by_task[task]
                else [],
            }
            for task, expert in plan.experts.items()
        ],
        method=plan.method.name,
        papers=plan.method.papers,
        routed=plan.method.routes,
        decides=plan.method.decides,
        predicts=all("classification" in pipeline_of(type(e.skeleton).__name__) for e in plan.experts.values()),
        keeps_features=plan.method.needs_features,
        keeps_bodies=plan.method.keeps_bodies,
        alpha=result.scales,
        overrides=[*map(str, plan.overrides), *([str(plan.lines)] if plan.lines else [])],
        choice=result.choice,
        places=[STANDING_COLUMNS, *result.places] if result.standings else [],
        agreement=result.agreement,
        scores=result.scores,
        refined=bool(result.refined),
        kept_adapter=(folder / REFINED_FOLDER).is_dir(),
        licences=sorted(map(markdown_text, set(plan.licences.values()) - {"not stated"})),
        model_class=type(plan.base.skeleton).__name__,
        embeds=plan.base.modules is not None and not adapter,
        adapter_rank=max((report.rank or 0 for report in result.weights), default=0),
        rank_error=max((report.rank_error or 0.0 for report in result.weights), default=0.0),
        task_heads=task_heads,
        version=__version__,
        num_samples=" to ".join(str(count) for count in sorted({min(num_samples), max(num_samples)}))
        if num_samples
        else "",
    )
    card.save(folder / CARD_FILE)


def _named(model: Checkpoint) -> str:
    """Return the id or folder of a model; for a live model, its class and what it was loaded from."""
    source = plain_text(model.source).replace("`", "'")  # it is shown as code
    if not isinstance(model.stored, LiveCheckpoint):
        return source or "a live PeftModel"
    return f"a live {type(model.skeleton).__name__}" + (f", loaded from {source}" if source else "")
