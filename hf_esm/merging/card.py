"""The model card of a merge: the plan as plain values for the template."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import ADAPTER_CONFIG, CARD_FILE, REFINED_FOLDER, Checkpoint, LiveCheckpoint, ModelSource
from ..hub import licence_metadata, pipeline_of, public_name, template
from ..planning import BASE
from ..utils import markdown_text
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
    task_heads = [task for task, head in plan.heads.by_task.items() if head]
    adapter = (folder / ADAPTER_CONFIG).is_file()
    named = [source.repo_id for name, source in sources.items() if source.repo_id and (name == BASE or not adapter)]
    library = "sentence-transformers" if plan.base.modules else "transformers"
    data = ModelCardData(
        base_model=list(dict.fromkeys(named)) or None,
        base_model_relation=("adapter" if adapter else "merge") if named else None,
        library_name="peft" if adapter else library,
        pipeline_tag=_pipeline_tag(plan.base, adapter),
        tags=["merge", "hf_esm", plan.method.name],
        **licence_metadata(list(plan.licences.values())),
    )
    card = ModelCard.from_template(
        data,
        template_str=template("merged.md"),
        base=_named(plan.base, sources.get(BASE)),
        base_licence=markdown_text(plan.licences.get(BASE, "not stated")),
        base_kind=type(plan.base.skeleton).__name__,
        experts=[
            {
                "task": markdown_text(task),
                "name": task,
                "source": _named(expert, sources.get(task)),
                "kind": expert.kind,
                "licence": markdown_text(plan.licences.get(task, "not stated")),
                "labels": list(map(markdown_text, expert.config.id2label.values()))
                if plan.heads.by_task[task]
                else [],
            }
            for task, expert in plan.experts.items()
        ],
        names={task: markdown_text(task) for task in plan.experts},
        method=plan.method.name,
        papers=plan.method.papers,
        routed=plan.method.routes,
        decides=plan.method.decides,
        predicts=all("classification" in pipeline_of(type(e.skeleton).__name__) for e in plan.experts.values()),
        keeps_features=plan.method.needs_features,
        keeps_bodies=plan.method.keeps_bodies,
        alpha=result.scales,
        alpha_origin=result.alpha_origin,
        evaluations=result.evaluations,
        overrides=[*map(str, plan.overrides), *([str(plan.lines)] if plan.lines else [])],
        choice=result.choice,
        alpha_scores=_alpha_scores(result),
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
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)  # of parts of the template that say nothing here
    card.save(folder / CARD_FILE)


def _named(model: Checkpoint, source: Optional[ModelSource]) -> str:
    """Return the name of a model in Markdown; for a live model, its class and what it was loaded from."""
    repo_id, root = (source.repo_id, source.root) if source else (None, None)
    words: Any = model.source
    if isinstance(model.stored, LiveCheckpoint):
        words = f"a live {type(model.skeleton).__name__}" + (f", loaded from {model.source}" if model.source else "")
    return public_name(words or "a live PeftModel", repo_id, model.revision, root)


def _pipeline_tag(base: Checkpoint, adapter: bool) -> Optional[str]:
    """Return what the Hub calls the task of the model in the root of the folder; None if that is not known."""
    if adapter:
        return None
    if base.modules:
        return "sentence-similarity"
    kind = type(base.skeleton)
    found = pipeline_of(kind.__name__)
    if found == "other" and kind.__name__.endswith("Model"):  # a body without a head
        bodies = {"input_ids": "feature-extraction", "pixel_values": "image-feature-extraction"}
        return bodies.get(kind.main_input_name)
    return None if found == "other" else found


def _alpha_scores(result: MergeResult) -> list[tuple[str, str, str]]:
    """Return the cells of a table of the scores by α, which names the chosen one and the default; empty if no search
    was made.
    """
    return [(f"{alpha:g}", f"{score:.3f}", result.alpha_mark(alpha)) for alpha, score in result.alpha_scores.items()]
