"""A search over the settings of a method, on validation rows or on agreement with the experts, never on test rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import isnan
from pathlib import Path
from typing import Any

from ..errors import HfEsmError
from ..methods import MergeMethod, describe_method
from ..utils import fingerprint


JOURNAL = "search.journal"  # Optuna's storage, in the folder of the cache


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        label: label of the method that was searched.
        method: the method with the best settings.
        settings: these settings by name.
        score: their score; higher is better.
        default_score: the score of the settings that the search began with.
        importance: by setting, the share of the variation of the scores that it explains (fANOVA,
            Hutter et al., 2014); empty if all scores are equal.
        trials: number of settings that were tried.
        scored_on: what the score is, in words.
    """

    label: str
    method: MergeMethod
    settings: dict[str, Any]
    score: float
    default_score: float
    importance: dict[str, float]
    trials: int
    scored_on: str

    def as_dict(self) -> dict[str, Any]:
        names = ("label", "settings", "score", "default_score", "importance", "trials", "scored_on")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value:.4g}" for name, value in self.settings.items())
        return (
            f"Searched {self.label}, {self.trials} settings, by {self.scored_on}: {self.score:.4f} with {settings}; "
            f"{self.default_score:.4f} to begin with."
        )


def ranges_of(method: MergeMethod) -> dict[str, tuple[float, float, str]]:
    """The ranges that a method's settings declare in `metadata["search"]`: lowest, highest, `"linear"` or `"log"`."""
    return {field.name: field.metadata["search"] for field in fields(method) if "search" in field.metadata}


def search_settings(
    label: str,
    method: MergeMethod,
    score: Callable[[MergeMethod], float],
    *,
    trials: int,
    folder: Path,
    identity: Any,
    scored_on: str,
) -> Found:
    """Search the settings of a method that declare a range, by Optuna's TPE, from the method's own settings on.

    A search that was interrupted, or had fewer trials, continues from its journal.

    Args:
        label: label of the method.
        method: the method.
        score: returns the score of the method with other settings; higher is better.
        trials: number of settings to try, the method's own included.
        folder: folder of the journal.
        identity: what the scores depend on, besides the method.
        scored_on: what the score is, in words.

    Raises:
        HfEsmError: without Optuna, or if all scores are NaN.
    """
    optuna = require_optuna()
    ranges = ranges_of(method)
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=fingerprint(describe_method(method), ranges, identity),
        sampler=optuna.samplers.TPESampler(seed=0),
        direction="maximize",
        load_if_exists=True,
    )
    if not study.trials:
        own = {name: getattr(method, name) for name in ranges}
        study.enqueue_trial({name: value for name, value in own.items() if value is not None})

    def objective(trial: Any) -> float:
        return score(replace(method, **{name: _suggested(trial, method, name, ranges[name]) for name in ranges}))

    complete = optuna.trial.TrialState.COMPLETE
    failed = optuna.trial.TrialState.FAIL
    done = len(study.get_trials(states=(complete, failed)))
    study.optimize(objective, n_trials=max(trials - done, 0))
    known = study.get_trials(states=(complete,))
    if not known:
        raise HfEsmError(f"search: every score of {label} is NaN. Check the metric and the rows of `validation`.")
    best = study.best_trial
    return Found(
        label=label,
        method=replace(method, **best.params),
        settings=dict(best.params),
        score=best.value,
        default_score=known[0].value,
        importance=_importance(optuna, study, known),
        trials=len(known),
        scored_on=scored_on,
    )


def _suggested(trial: Any, method: MergeMethod, name: str, bounds: tuple[float, float, str]) -> float:
    low, high, scale = bounds
    suggest = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
    return suggest(name, low, high, log=scale == "log")


def _importance(optuna: Any, study: Any, known: list[Any]) -> dict[str, float]:
    values = {trial.value for trial in known}
    if len(values) < 2 or len(known) < 4:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: 0.0 if isnan(share) else float(share) for name, share in shares.items()}


def check_searchable(methods: Mapping[str, MergeMethod], trials: Any, validation: Any, calibration: Any) -> None:
    """Raise `HfEsmError` if nothing can be searched.

    Args:
        methods: methods by label.
        trials: number of settings to try for each.
        validation, calibration: labelled rows and samples, if any.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise HfEsmError(f"`search` must be a whole number, 1 or more, not {trials!r}.")
    require_optuna()
    searched = {label: method for label, method in methods.items() if ranges_of(method)}
    if not searched:
        raise HfEsmError(f"`search`: no setting of {', '.join(methods)} has a range. Compare others, such as 'esm'.")
    if validation is None and calibration is None:
        raise HfEsmError("`search` needs labelled rows (`validation`), or samples (`calibration`) for agreement.")
    if fixed := [label for label, method in searched.items() if validation is None and not method.tunable]:
        raise HfEsmError(
            f"`search`: {fixed[0]} has no α, so that it is not scored by agreement. Pass `validation` rows, or leave "
            "it out."
        )


def require_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        HfEsmError: if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise HfEsmError("`search` needs Optuna, which is not installed: pip install hf_esm[search]") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
