"""Where the router of a model could decide: how many samples it would send to their task, block by block."""

from collections import defaultdict
from collections.abc import Mapping

from ..architecture import block_depths, depth_of, reads_prompts, tower_of, towers
from ..calibration import pooled_inputs
from ..checkpoints import Access, open_checkpoint, resolve_source
from ..data import Sample
from .experts import load_experts
from .model import RoutedModel
from .router import found_by_block


def routes_by_block(
    routed: RoutedModel, samples: Mapping[str, list[Sample]], access: Access, batch_size: int = 32
) -> dict[str, dict[str, list[float]]]:
    """Return the share of each task's samples that the router would send to the task, by tower (`""` in a model
    without towers), task and number of blocks that run before the decision.

    A prototype router decides in every block: the share is the mean over the block's linear maps.

    Args:
        routed: with a prototype router, or with a discriminant router that reads all blocks (`depth=1`).
        samples: encoded samples by task.
    """
    if routed.config.router == "prototype":
        return _by_prototypes(routed, samples, batch_size)
    opened = open_checkpoint(resolve_source(str(routed.folder), str(routed.folder), access))
    static, read = opened.load_model(), {}
    for task, rows in samples.items():
        prompts = list(map(_prompt, rows)) if reads_prompts(static) else rows
        pooled = pooled_inputs(static, prompts, batch_size=batch_size, title=task, progress=False)
        read[task] = {opened.names[name].removesuffix(".weight"): part for name, part in pooled.items()}
    return found_by_block(load_experts(routed.folder).features, read, towers(static))


def _by_prototypes(
    routed: RoutedModel, samples: Mapping[str, list[Sample]], batch_size: int
) -> dict[str, dict[str, list[float]]]:
    static = routed.model.get_base_model()
    depths, names = block_depths(static), towers(static)
    shares: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for task, rows in samples.items():
        right: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for explanation in routed.explain(rows, batch_size):
            for module, likeliest in explanation.layers.items():
                if depth := depth_of(module, depths):
                    right[tower_of(module, names)][depth[0]].append(likeliest == task)
        for tower, blocks in right.items():
            shares[tower][task] = [sum(blocks[i]) / len(blocks[i]) for i in sorted(blocks)]
    return {tower: by_task for tower, by_task in shares.items() if by_task.keys() == samples.keys()}


def _prompt(sample: Sample) -> Sample:
    """Return what a router reads of a sample: the tokens before the first label, or all if there are none before."""
    labels = sample.get("labels")
    end = 0 if labels is None else int((labels == -100).cumprod(0).sum())
    aligned = {n: v[:end] if end and v.shape[:1] == labels.shape else v for n, v in sample.items()}
    return {name: value for name, value in aligned.items() if name != "labels"}
