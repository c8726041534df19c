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
from ..utils import plain_table
from .alpha import TaskScore
from .contest import STANDING_COLUMNS, Standing
from .judging import TaskAgreement
from .updates import WeightReport


@dataclass(repr=False)
class MergeResult:
    """A merged model on disk, and a report of the merge. `print` shows the report; warnings were logged.

    Attributes:
        output_dir: folder of the merged model; a temporary one, which is removed with this object, if the caller
            named none.
        alpha: scale of the merged update.
        alpha_by_kind: other scales of some kinds of weights, if the caller named any.
        alpha_scores: mean score by α, if α was searched: on labelled rows, or agreement with the experts.
        alpha_default: the default α of the method; None for a method without α.
        evaluations: number of merged models that were scored to choose method and α, in `seconds["choosing"]`.
        alpha_errors: standard error of each of `alpha_scores`, over draws of the rows or samples; empty if the scores
            are not ones of rows.
        weights: a report for each merged weight, in the order of the base: rule, norms, scales, energy kept.
        seconds: time by stage, in seconds.
        warnings: messages for the user, in the order in which they were logged.
        plan: result of the checks: models, commits, heads, method.
        chosen_by: what chose method and α: `"labels"`, `"agreement"`, or `"default"`.
        choice: the same as one line, with the numbers; empty for a default.
        agreement: by task, agreement of the merged model and of the base with the expert, on samples that neither
            statistics nor gates were made from; empty if there were none.
        scores: by task, or as `"merged"`, the score of the merged model, of the base and of the expert on the rows
            that chose α; empty if labels did not choose it.
        standings: places of all candidates and of the base, if methods were chosen.
        refined: divergence from the experts by step of refining, as a share of the base's; empty if not refined.
    """

    output_dir: Path
    alpha: float
    alpha_scores: dict[float, float]
    weights: list[WeightReport]
    seconds: dict[str, float]
    warnings: list[str]
    plan: MergePlan
    chosen_by: str = "default"
    choice: str = ""
    agreement: dict[str, TaskAgreement] = field(default_factory=dict)
    scores: dict[str, TaskScore] = field(default_factory=dict)
    refined: dict[int, float] = field(default_factory=dict)
    alpha_by_kind: dict[str, float] = field(default_factory=dict)
    alpha_errors: dict[float, float] = field(default_factory=dict)
    alpha_default: Optional[float] = None
    evaluations: int = 0
    standings: list[Standing] = field(default_factory=list)
    _temporary: Any = field(default=None)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """Load the merged model, or the base with the merged adapter on it, in the class of the base; `kwargs` are
        passed to `from_pretrained`.
        """
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
        return f"MergeResult({method} of {tasks}, alpha={self.scales}, output_dir={str(self.output_dir)!r})"

    @property
    def scales(self) -> str:
        """α in words, with those of kinds of weights."""
        return f"{self.alpha:g}" + "".join(f", {kind} {alpha:g}" for kind, alpha in self.alpha_by_kind.items())

    @property
    def alpha_origin(self) -> str:
        """Where α comes from, in words; empty for a method without α, and where kinds of weights have their own."""
        if self.alpha_default is None or self.alpha_by_kind:
            return ""
        if self.alpha_scores:
            return f"chosen; the default is {self.alpha_default:g}"
        return "the default" if self.alpha == self.alpha_default else f"given; the default is {self.alpha_default:g}"

    def alpha_mark(self, alpha: float) -> str:
        """Whether one of `alpha_scores` is the chosen α, the default, or both, in words."""
        names = {"chosen": self.alpha, "default": self.alpha_default}
        return ", ".join(name for name, value in names.items() if value == alpha)

    @property
    def cost(self) -> str:
        """What choosing method and α took, in words; empty if nothing was scored for that."""
        if not self.evaluations:
            return ""
        return f"{self.evaluations} merged models scored in {self.seconds.get('choosing', 0):.1f} s"

    @property
    def places(self) -> list[tuple[str, ...]]:
        """`standings` as cells of a table, with the columns `STANDING_COLUMNS`."""
        return [place.cells for place in self.standings]

    def __str__(self) -> str:
        rules = Counter(report.how for report in self.weights)
        counts = [
            f"{count} unchanged" if rule == "unchanged" else f"{count} by {rule}" for rule, count in rules.items()
        ]
        lines = [
            f"{self.plan.method.name}: {len(self.plan.experts)} experts merged, alpha {self.scales}"
            + (f" ({self.alpha_origin})" if self.alpha_origin else ""),
            "  weights  " + ", ".join(counts),
        ]
        if self.plan.lines:
            lines.append(f"  depth    {self.plan.lines}")
        energies = [value for report in self.weights for value in report.energy_kept.values()]
        if energies:
            lines.append(f"  energy   {sum(energies) / len(energies):.1%} of the output shifts kept on average")
        errors = [report.rank_error for report in self.weights if report.rank_error is not None]
        if errors:
            rank, mean = max(report.rank or 0 for report in self.weights), sum(errors) / len(errors)
            lines.append(f"  adapter  rank {rank}; relative error {mean:.3g} on average, at most {max(errors):.3g}")
        if self.choice:
            lines.append(f"  chosen   {self.choice}")
        if self.standings:
            lines += [f"    {line}" for line in plain_table([list(STANDING_COLUMNS), *map(list, self.places)])]
        if self.alpha_scores:
            marks = {alpha: f" ({mark})" if (mark := self.alpha_mark(alpha)) else "" for alpha in self.alpha_scores}
            curve = ", ".join(f"{alpha:g} {score:.3f}{marks[alpha]}" for alpha, score in self.alpha_scores.items())
            lines.append(f"  by alpha {curve}")
        if self.cost:
            lines.append(f"  cost     {self.cost}")
        if self.refined:
            first, last = self.refined[0], min(self.refined.values())
            lines.append(f"  refined  divergence from the experts {first:.3f} → {last:.3f} of the base's")
        if self.scores:
            metric = next(iter(self.scores.values())).metric
            lines.append(f"  {metric:8} " + ", ".join(f"{task} {score}" for task, score in self.scores.items()))
        if self.agreement:
            shown = ", ".join(
                f"{task} {found.merged:.2f}" + (f" (base {found.base:.2f})" if found.base else "")
                for task, found in self.agreement.items()
            )
            lines.append(f"  agrees   {shown}; 1 is the expert")
        lines.append("  time     " + ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items()))
        return "\n".join([*lines, f"  written  {self.output_dir}"])
