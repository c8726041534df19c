"""What an expert's layers read on its samples.

Comes in: a model and encoded samples. Goes out: `ActivationStatistics`, one safetensors file per expert, which serve
every later merge.
"""

from .calibrator import calibrate, calibrate_checkpoint, pool_inputs
from .collection import collect_statistics, pooled_inputs
from .decoder_inputs import with_decoder_inputs, with_first_decoder_input
from .placement import factor_bytes, loaded_model
from .reading import Reading
from .statistics import ActivationStatistics


__all__ = [
    "ActivationStatistics",
    "Reading",
    "calibrate",
    "calibrate_checkpoint",
    "collect_statistics",
    "factor_bytes",
    "loaded_model",
    "pool_inputs",
    "pooled_inputs",
    "with_decoder_inputs",
    "with_first_decoder_input",
]
