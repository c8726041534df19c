"""Semantic segmentation: maps of classes, one for each pixel."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from ..data.batches import batch_for, batch_indices
from ..data.samples import Sample
from ..errors import HfEsmError


def read_map(label: Any, config: PretrainedConfig, title: str, reduced: bool = False) -> Tensor:
    """A picture or an array of classes as `[H, W]` int64, -100 where none is asked for.

    Those are `config.semantic_loss_ignore_index` (255); and, if `reduced`, 0, and all other classes count one less, as
    an image processor's `do_reduce_labels` has it.
    """
    try:
        classes = np.asarray(label)
    except ValueError as error:
        raise HfEsmError(f"{title}: a label is no map of classes ({error}).") from None
    if classes.ndim != 2 or classes.dtype.kind not in "ui":
        raise HfEsmError(
            f"{title}: a label is {classes.dtype} of shape {classes.shape}; mean-iou needs whole numbers of shape "
            "[height, width], the class of each pixel. A picture of them has to be grey, or have a palette."
        )
    found = torch.from_numpy(classes.astype(np.int64))
    unasked = (found == getattr(config, "semantic_loss_ignore_index", 255)) | (found == -100)
    if reduced:
        unasked |= found == 0
        found = found - 1
    if (wrong := found[~unasked & ((found < 0) | (found >= config.num_labels))]).numel():
        raise HfEsmError(f"{title}: a pixel has the class {int(wrong[0])}, but the expert knows {config.num_labels}.")
    return found.masked_fill(unasked, -100)


@torch.no_grad()
def overlaps_of(model: PreTrainedModel, samples: list[Sample], maps: list[Tensor], batch_size: int = 32) -> Tensor:
    """`[N, 3, C]` int64: of a sample's pixels and each class, how many are rightly found, found, and labelled. Logits
    are brought to the size of the sample's map, as Transformers' image processors do.

    Raises:
        HfEsmError: if the model gives no class per pixel.
    """
    found = torch.zeros(len(samples), 3, model.config.num_labels, dtype=torch.int64)
    for chosen in batch_indices(samples, batch_size):
        logits = getattr(model(**batch_for([samples[i] for i in chosen], model)), "logits", None)
        if logits is None or logits.dim() != 4:
            raise HfEsmError(
                f"{type(model).__name__} gives no class per pixel; mean-iou needs a model of semantic segmentation."
            )
        for i, row in zip(chosen, logits.float().cpu(), strict=True):
            asked = maps[i] != -100
            sized = F.interpolate(row[None], size=asked.shape, mode="bilinear", align_corners=False)[0]
            answer, right = sized.argmax(0)[asked], maps[i][asked]
            counted = (answer[answer == right], answer, right)
            found[i] = torch.stack([torch.bincount(part, minlength=found.shape[2]) for part in counted])
    return found
