"""What a score is.

Comes in: a model and labelled rows, or an expert's answers on samples. Goes out: a metric's score, the outputs that it
was computed from, agreement with the expert, and pictures.
"""

from .agreement import ROUNDING, Agreement, ExpertAnswers, agreement_of, collect_answers, divergence
from .answers import batches_of, in_vocabulary
from .drawing import REFERENCE, Chart, Line, colour_of, require_matplotlib, spread_colours, styles_of
from .harness import HarnessMetric
from .labels import LabelledSamples
from .metric import ACCURACY, Metric, load_labelled
from .named import BUILT_IN, MetricSpec, resolve_metric
from .plots import (
    MOST_METHODS,
    plot_bars,
    plot_chart,
    plot_kept_shares,
    plot_matrix,
    plot_task_scores,
)
from .scores import Outcome, Scores, accuracy, interval_of, normalised, run


__all__ = [
    "ACCURACY",
    "BUILT_IN",
    "MOST_METHODS",
    "REFERENCE",
    "ROUNDING",
    "Agreement",
    "Chart",
    "ExpertAnswers",
    "HarnessMetric",
    "LabelledSamples",
    "Line",
    "Metric",
    "MetricSpec",
    "Outcome",
    "Scores",
    "accuracy",
    "agreement_of",
    "batches_of",
    "collect_answers",
    "colour_of",
    "divergence",
    "in_vocabulary",
    "interval_of",
    "load_labelled",
    "normalised",
    "plot_bars",
    "plot_chart",
    "plot_kept_shares",
    "plot_matrix",
    "plot_task_scores",
    "require_matplotlib",
    "resolve_metric",
    "run",
    "spread_colours",
    "styles_of",
]
