"""What a merge did."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from transformers import PreTrainedModel

from ..checkpoints import load_task_model
from ..hub import push_folder
from ..planning import MergePlan
from ..routing import RoutedModel
from .updates import WeightReport


@dataclass
class MergeResult:
    """What a merge did.

    Attributes:
        output_dir: folder with the merged model (a temporary one, gone with this object, if none was asked for).
        alpha: scale of the merged update.
        alpha_scores: mean validation score by α, if it was searched.
        weights: what became of each merged weight: rule, norms, scales, energy kept.
        seconds: time by stage.
        warnings: what was noticed on the way.
        plan: the checks' outcome: models, commits, heads, method.
    """

    output_dir: Path
    alpha: float
    alpha_scores: dict[float, float]
    weights: list[WeightReport]
    seconds: dict[str, float]
    warnings: list[str]
    plan: MergePlan
    _temporary: Any = field(default=None, repr=False)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """The merged model, in the base's class; `kwargs` go to `from_pretrained`."""
        return type(self.plan.base.skeleton).from_pretrained(self.output_dir, **kwargs)

    def load_task_model(self, task: str, **kwargs: Any) -> PreTrainedModel:
        """The merged body with the head of one task; see `heads.load_task_model`."""
        return load_task_model(self.output_dir, task, **kwargs)

    def load_routed(self, **kwargs: Any) -> RoutedModel:
        """The merged model with its experts, if the method was ESM++; see `RoutedModel.from_pretrained`."""
        return RoutedModel.from_pretrained(self.output_dir, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: Optional[bool] = None, token: Any = None, **kwargs: Any) -> Any:
        """Upload the merged model, its heads, card and recipe. Calibration samples stay here."""
        return push_folder(self.output_dir, repo_id, private=private, token=token, **kwargs)

    def __str__(self) -> str:
        how = Counter(report.how for report in self.weights)
        lines = [f"{self.plan.method.name}: {len(self.plan.experts)} experts merged, alpha {self.alpha:g}"]
        rules = [f"{count} unchanged" if rule == "unchanged" else f"{count} by {rule}" for rule, count in how.items()]
        lines.append("  weights  " + ", ".join(rules))
        energies = [value for report in self.weights for value in report.energy_kept.values()]
        if energies:
            lines.append(f"  energy   {sum(energies) / len(energies):.1%} of the output shifts kept on average")
        lines.append("  time     " + ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items()))
        lines += [f"  warning  {warning}" for warning in self.warnings]
        return "\n".join([*lines, f"  written  {self.output_dir}"])
