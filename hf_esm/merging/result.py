"""What a merge returns."""

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


@dataclass(repr=False)
class MergeResult:
    """A merged model on disk, and a report of the merge. `print` shows the report.

    Attributes:
        output_dir: folder of the merged model; a temporary one, which is removed with this object, if the caller
            named none.
        alpha: scale of the merged update.
        alpha_scores: mean validation score by α, if α was searched.
        weights: a report for each merged weight, in the order of the base: rule, norms, scales, energy kept.
        seconds: time by stage, in seconds.
        warnings: messages for the user, in the order in which they were logged.
        plan: result of the checks: models, commits, heads, method.
    """

    output_dir: Path
    alpha: float
    alpha_scores: dict[float, float]
    weights: list[WeightReport]
    seconds: dict[str, float]
    warnings: list[str]
    plan: MergePlan
    _temporary: Any = field(default=None)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """Load the merged model, in the class of the base; `kwargs` are passed to `from_pretrained`."""
        return type(self.plan.base.skeleton).from_pretrained(self.output_dir, **kwargs)

    def load_task_model(self, task: str, **kwargs: Any) -> PreTrainedModel:
        """Load the merged body with the head of one task; see `hf_esm.load_task_model`."""
        return load_task_model(self.output_dir, task, **kwargs)

    def load_routed(self, **kwargs: Any) -> RoutedModel:
        """Load the merged model with its experts, if the method writes experts; see `RoutedModel.from_pretrained`."""
        return RoutedModel.from_pretrained(self.output_dir, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: Optional[bool] = None,
        token: Optional[str | bool] = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the merged model with its heads, card and recipe; calibration samples are not uploaded.

        Args:
            repo_id: repository on the Hub, which is made if it does not exist.
            private: whether a new repository is private.
            token: access token for the Hub.
            kwargs: passed to `hub.push_folder`: `revision`, `base_model`, …
        """
        return push_folder(self.output_dir, repo_id, private=private, token=token, **kwargs)

    def __repr__(self) -> str:
        method, tasks = self.plan.method.name, ", ".join(self.plan.experts)
        return f"MergeResult({method} of {tasks}, alpha={self.alpha:g}, output_dir={str(self.output_dir)!r})"

    def __str__(self) -> str:
        rules = Counter(report.how for report in self.weights)
        counts = [
            f"{count} unchanged" if rule == "unchanged" else f"{count} by {rule}" for rule, count in rules.items()
        ]
        lines = [
            f"{self.plan.method.name}: {len(self.plan.experts)} experts merged, alpha {self.alpha:g}",
            "  weights  " + ", ".join(counts),
        ]
        energies = [value for report in self.weights for value in report.energy_kept.values()]
        if energies:
            lines.append(f"  energy   {sum(energies) / len(energies):.1%} of the output shifts kept on average")
        lines.append("  time     " + ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items()))
        lines += [f"  warning  {warning}" for warning in self.warnings]
        return "\n".join([*lines, f"  written  {self.output_dir}"])
