"""The model card of a merged model, from the template in `model_cards/`."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .checkpoints import LoraCheckpoint, ModelSource
from .methods import ROUTED
from .planning import MergePlan
from .version import __version__


TEMPLATE = "merged.md"


def write_card(
    folder: Path, plan: MergePlan, sources: dict[str, ModelSource], alpha: float, num_samples: list[int]
) -> None:
    """Write `README.md`: what was merged and how, how to load it, licence and limits.

    `num_samples` holds the number of proxy samples of each expert that was calibrated.
    """
    licences = set(plan.licences.values())
    task_heads = [task for task, own in plan.heads.own.items() if own]
    data = ModelCardData(
        base_model=[source.repo_id for source in sources.values() if source.repo_id] or None,
        base_model_relation="merge" if any(source.repo_id for source in sources.values()) else None,
        library_name="transformers",
        license=licences.pop() if len(licences) == 1 and "not stated" not in licences else None,
        tags=["merge", "hf_esm", plan.method.name],
    )
    card = ModelCard.from_template(
        data,
        template_str=_template(),
        base=plan.base.source or type(plan.base.skeleton).__name__,
        experts=[
            {
                "task": task,
                "source": expert.source or "live model",
                "revision": expert.revision,
                "kind": "LoRA" if isinstance(expert, LoraCheckpoint) else type(expert.skeleton).__name__,
                "licence": plan.licences.get(task, "not stated"),
                "labels": list(expert.config.id2label.values()) if plan.heads.own[task] else [],
            }
            for task, expert in plan.experts.items()
        ],
        method=plan.method.name,
        routed=isinstance(plan.method, ROUTED),
        alpha=alpha,
        model_class=type(plan.base.skeleton).__name__,
        task_heads=task_heads,
        version=__version__,
        num_samples=" to ".join(str(count) for count in sorted({min(num_samples), max(num_samples)}))
        if num_samples
        else "",
    )
    card.save(folder / "README.md")


def _template() -> str:
    """The template, from the installed package or from the checkout that it is developed in."""
    places = (Path(__file__).parent / "model_cards", Path(__file__).parents[1] / "model_cards")
    return next(place / TEMPLATE for place in places if place.is_dir()).read_text(encoding="utf-8")
