"""Live weights to stored tensors and back, by Transformers' own conversion tables, one group of weights at a time."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import HfQuantizer
from transformers.utils.loading_report import LoadStateDictInfo

from ..architecture import SENTENCE_MODULES, canonical_names, ties
from .base import Checkpoint
from .quantised import dense_dtypes, dense_key, lacks_scales


@dataclass
class OutputGroup:
    """Weights that are written together: usually one, more where the layout on disk joins or splits them.

    Attributes:
        names: canonical names of the live weights.
        stored: the tensors on disk by their names there, on the meta device.
    """

    names: list[str]
    stored: dict[str, Tensor]


def written_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Return a copy of a checkpoint's config, which says that the embeddings are not tied if no weights are.

    Transformers 5 compares the stored weights, but older versions and inference servers believe the config. A config
    that ties other weights too, as T5's, cannot say it.
    """
    model = checkpoint.skeleton
    config = copy.deepcopy(model.config)
    if getattr(config, "tie_word_embeddings", False) and model._tied_weights_keys and not ties(model):
        config.tie_word_embeddings = False
    return config


def write_plan(checkpoint: Checkpoint, dtype: Optional[torch.dtype] = None) -> list[OutputGroup]:
    """Return the tensors that `save_pretrained` would write for the model of a checkpoint, in reading order.

    Args:
        dtype: dtype of every floating-point weight; by default each weight keeps its own.
    """
    model = checkpoint.skeleton
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the model was never loaded from disk
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    backwards = [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name, live in checkpoint.names.items():
        if live.startswith(f"{SENTENCE_MODULES}."):  # in folders of their own
            continue
        groups.setdefault(apply_converters(live, backwards)[0], []).append(name)
    plan = []
    for names in groups.values():
        tensors = {
            name: torch.empty(checkpoint.shape(name), dtype=output_dtype(checkpoint.dtype(name), dtype), device="meta")
            for name in names
        }
        plan.append(OutputGroup(names, to_stored(checkpoint, tensors)))
    return plan


def output_dtype(stored: torch.dtype, asked: Optional[torch.dtype]) -> torch.dtype:
    """Return the dtype that a weight is written in: the one asked for, if the weight is a floating-point one."""
    return asked if asked is not None and stored.is_floating_point else stored


def to_stored(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of one group, by canonical name, to the tensors on disk, by their names there."""
    live = {checkpoint.names[name]: tensor for name, tensor in tensors.items()}
    return revert_weight_conversion(checkpoint.skeleton, live)


@dataclass
class _Group:
    """Stored tensors that become live weights together; usually one tensor becomes one weight.

    Attributes:
        keys: name of each stored tensor, and the pattern of the converter that it matches.
        converter: makes the weights of the tensors; None if the one tensor is the weight.
        alias: name of a tied weight that is stored, and name of the weight that is its source but is not stored.
    """

    keys: list[tuple[str, Optional[str]]]
    converter: Optional[WeightConverter]
    alias: Optional[tuple[str, str]] = None

    @property
    def quantised(self) -> bool:
        """Whether several tensors are dequantised into the weights."""
        operations = self.converter.operations if self.converter else []
        return len(self.keys) > 1 and any(getattr(operation, "hf_quantizer", None) for operation in operations)


class StoredWeights:
    """The live weights of a model, made of stored tensors as Transformers' loader makes them, but group by group.

    Attributes:
        tensors: the live weights that are stored, by live name, on the meta device.
        names: `{canonical name: live name}` of these weights.
        missing: canonical names of weights that are not stored, but for those that the model can do without.
        extra: names of stored tensors that the model has no place for, but for outdated ones.
        misfits: canonical names of weights whose stored shape is not the model's.
        unscaled: names of stored tensors that are codes of quantised weights without scales.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keys: Iterable[str],
        read_meta: Callable[[str], Tensor],
        quantiser: Optional[HfQuantizer] = None,
    ):
        """Find out which stored tensors make which weight.

        Args:
            model: the model on the meta device. Its `_weight_conversions` are set, which `to_stored` reverts.
            keys: names of the stored tensors.
            read_meta: returns a stored tensor on the meta device.
            quantiser: Transformers' quantiser of the stored model, set to dequantise, if the model is quantised.
        """
        self._model, state = model, model.state_dict()
        self._dtypes = dense_dtypes(model) if quantiser is not None else {}
        self._groups, unplaced = _group_keys(model, state, keys, quantiser)
        self.unscaled = [
            group.keys[0][0]
            for first, group in self._groups.items()
            if state[first].is_floating_point()
            and lacks_scales((read_meta(key).dtype, pattern or key) for key, pattern in group.keys)
        ]
        self._first_of: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        for first in self._groups:
            for live, tensor in self._on_meta(first, read_meta, state).items():
                self._first_of[live], self.tensors[live] = first, tensor
        for alias, source in ties(model).items():
            if source not in self.tensors and alias in self.tensors:
                self._first_of[source], self.tensors[source] = self._first_of[alias], self.tensors[alias]
                self._groups[self._first_of[source]].alias = (alias, source)
        expected = canonical_names(model)
        self.names = {name: live for name, live in expected.items() if live in self.tensors}
        # Transformers knows weights that a model can do without (BART's bias of zeros), and outdated ones (BERT's
        # position_ids).
        report = LoadStateDictInfo(
            missing_keys={live for live in expected.values() if live not in self.tensors},
            unexpected_keys=set(unplaced),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        model._adjust_missing_and_unexpected_keys(report)
        self.missing = [name for name, live in expected.items() if live in report.missing_keys]
        self.extra = [key for key in unplaced if key in report.unexpected_keys]
        self.misfits = [name for name, live in self.names.items() if self.tensors[live].shape != state[live].shape]

    def group_of(self, live: str) -> str:
        """Return the key, for `read`, of the group that a live weight belongs to."""
        return self._first_of[live]

    def _on_meta(self, first: str, read_meta: Callable[[str], Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the live weights of one group on the meta device.

        The shapes of quantised weights are those of the model, as some are stored in tensors that are not read yet.
        """
        group = self._groups[first]
        if not group.quantised:
            return self.read(first, read_meta)
        patterns = group.converter.target_patterns
        lives = [first.replace(patterns[0], pattern, 1) for pattern in patterns]
        return {live: torch.empty_like(state[live], dtype=self._dtypes[live]) for live in lives}

    def read(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the live weights of one group, by live name; `read` returns a stored tensor."""
        group = self._groups[first]
        if group.converter is None:
            weights = {first: read(group.keys[0][0])}
        else:
            converter = copy.deepcopy(group.converter)
            for key, pattern in group.keys:
                converter.add_tensor(first, key, pattern, read(key))
            converted = converter.convert(first, model=self._model, config=self._model.config)
            weights = {live: t[0] if isinstance(t, list) else t for live, t in converted.items()}
        weights = {live: t.to(output_dtype(t.dtype, self._dtypes.get(live))) for live, t in weights.items()}
        if group.alias:
            alias, source = group.alias
            weights[source] = weights[alias]
        return weights


def _group_keys(
    model: PreTrainedModel, state: dict[str, Tensor], keys: Iterable[str], quantiser: Optional[HfQuantizer]
) -> tuple[dict[str, _Group], list[str]]:
    """Group the names of stored tensors by the first live weight that they make; also return those without a place."""
    conversions = get_model_conversion_mapping(model, hf_quantizer=quantiser)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, _Group] = {}
    unplaced = []
    for key in sorted(keys, key=dot_natural_key):
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and key in state:
            renamed, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if renamed in state:
            groups.setdefault(renamed, _Group([], by_pattern.get(pattern))).keys.append((key, pattern))
        else:
            unplaced.append(key)
    if quantiser is None:
        model._weight_conversions = [entry for entry in conversions if entry.was_used()]
    else:  # the weights are written as those of a model that is not quantised
        _group_keys(model, state, {dense_key(key, quantiser) for key in keys}, None)
    return groups, unplaced
