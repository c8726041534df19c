"""What a merge will do, planned from headers and checked before any long work.

Comes in: the caller's arguments, or a recipe. Goes out: a checked `MergePlan`, or an error of one sentence.
"""

from .arguments import MergeData, check_arguments, check_replaceable, name_experts, task_weights
from .chat import choose_voice, endless_turns, merged_processor, tokenizer_of
from .checks import (
    check_disk,
    check_factors,
    check_finite,
    check_heads,
    check_memory,
    check_values,
    differs,
    note_changed,
)
from .depth import LinesSettings, resolve_lines
from .kinship import check_trained
from .low_rank import check_low_rank
from .mergekit import convert_mergekit
from .options import MergeOptions, torch_dtype
from .overrides import Override, Rule, resolve_overrides
from .plan import MergePlan, calibrated_widths, counted_rows, plan_merge
from .recipe import RECIPE_VERSION, absolute_path, load_recipe, read_yaml
from .refinement import RefineSettings, refining_bytes, resolve_refine
from .resources import merge_bytes
from .token_sources import BASE, resolve_tokenizer
from .vocabulary import Vocabulary, plan_vocabulary


__all__ = [
    "BASE",
    "RECIPE_VERSION",
    "LinesSettings",
    "MergeData",
    "MergeOptions",
    "MergePlan",
    "Override",
    "RefineSettings",
    "Rule",
    "Vocabulary",
    "absolute_path",
    "calibrated_widths",
    "check_arguments",
    "check_disk",
    "check_factors",
    "check_finite",
    "check_heads",
    "check_low_rank",
    "check_memory",
    "check_replaceable",
    "check_trained",
    "check_values",
    "choose_voice",
    "convert_mergekit",
    "counted_rows",
    "differs",
    "endless_turns",
    "load_recipe",
    "merge_bytes",
    "merged_processor",
    "name_experts",
    "note_changed",
    "plan_merge",
    "plan_vocabulary",
    "read_yaml",
    "refining_bytes",
    "resolve_lines",
    "resolve_overrides",
    "resolve_refine",
    "resolve_tokenizer",
    "task_weights",
    "tokenizer_of",
    "torch_dtype",
]
