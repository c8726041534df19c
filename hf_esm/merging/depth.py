"""The scale of merged updates by depth (LiNeS, arXiv 2410.17146)."""

from collections.abc import Mapping

from ..architecture import depth_of
from ..planning import MergePlan
from .updates import WeightReport


def scale_by_depth(
    reports: Mapping[str, WeightReport], plan: MergePlan, depths: Mapping[str, tuple[int, int]]
) -> None:
    """Set the scale by depth of each report that α scales; see `LinesSettings`.

    Weights outside of the blocks have the scale of the first block, as in the published code, which scales heads and
    final norms so, too. Encoder and decoder, or two towers, begin anew. Weights that α does not scale, and those of a
    method without α, keep their scale.

    Args:
        reports: by canonical name, with their scales between layers; all of the model's, unless end points are given.
        depths: see `block_depths`.
    """
    lines = plan.lines
    if lines is None or not plan.method.tunable:
        return
    scaled = {name: report for name, report in reports.items() if report.scaled and plan.rule_of(name).method.tunable}
    smallest = 0.0
    if lines.first is None:
        measured = [report for report in scaled.values() if report.magnitudes]
        merged = sum(report.layer_scale * report.magnitudes[0] for report in measured)
        smallest = sum(report.magnitudes[1] for report in measured) / (len(plan.experts) * merged) if merged else 0.0
    for name, report in scaled.items():
        depth = depth_of(plan.base.names[name], depths)
        place = 0.0 if depth is None else depth[0] / max(depth[1] - 1, 1)
        if lines.first is None or lines.last is None:
            report.depth_scale = (smallest, place)
        else:
            report.depth_scale = (0.0, lines.first + (lines.last - lines.first) * place)
