"""Which expert each sample gets: a frame around every forward pass, and decisions that are kept.

A layer sees its input and nothing else: not which rows are padding, nor what other layers decided. Hooks on the model
(and on every model nested in it) therefore keep a stack of frames, one stack per thread, in which the layers find the
mask and leave their decisions. With a KV cache, the decisions stay on the cache: the prompt decides, decoding reuses.
The towers of a model that compares two kinds of input, as CLIP does, read samples of their own, and decide for them.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...architecture import towers
from ...errors import HfEsmError
from .capturing import capture_once
from .checkpointing import keep_routes


ONE_PER_SAMPLE = "Give one task per sample."


class Route(NamedTuple):
    """The experts of every sample of a batch, and how much of each is added.

    Attributes:
        experts: `[B]` int64, or `[B, k]` where a sample gets several.
        weights: float32 of the same shape, 0 for the static model alone; None where every expert counts wholly.
    """

    experts: Tensor
    weights: Optional[Tensor] = None

    def for_batch(self, size: int) -> "Route":
        """The same for a batch in which every sample stands several times in a row (beams)."""
        have = self.experts.shape[0]
        if have == size:
            return self
        if size % have:
            raise HfEsmError(f"Routes of {have} samples do not fit a batch of {size}. {ONE_PER_SAMPLE}")
        return Route(*(None if part is None else part.repeat_interleave(size // have, dim=0) for part in self))

    def to(self, device: torch.device) -> "Route":
        return Route(*(None if part is None else part.to(device) for part in self))


@dataclass
class Decision:
    """What a router found out about a batch.

    Attributes:
        route: the experts that are added.
        probabilities: `[B, T]` of the tasks; cosines, from a prototype router.
        distance: `[B]`, how far each sample is from all tasks, in units of what is still believed to be one of them.
    """

    route: Route
    probabilities: Tensor
    distance: Optional[Tensor] = None


class Decided(Exception):
    """Ends a forward pass that was wanted for its decision alone."""


# Where the decisions stay between the passes of one generation: on the cache, or on the encoder's output.
_KEPT = "_hf_esm_decisions"


# What models call their cache; the latter, those that keep a state of fixed size.
_CACHES = ("past_key_values", "cache_params")


@dataclass
class Frame:
    """One forward pass of a model.

    Attributes:
        batch: number of samples.
        mask: the attention mask as it was given.
        encoder_mask, encoder_states: what cross-attention reads.
        prompt: `[B, n]`, False from the first token on that is scored rather than read (labels), or None.
        decisions: by adapter (one decision per sample), or by adapter and module.
        decoding: whether decisions of an earlier pass hold.
        past: tokens in the cache before this pass.
        evidence: sums that readers left for the one that decides, by adapter.
        read: modules that have run.
    """

    batch: int
    mask: Any = None
    encoder_mask: Any = None
    encoder_states: Optional[Tensor] = None
    prompt: Optional[Tensor] = None
    decisions: dict[Any, Decision] = field(default_factory=dict)
    decoding: bool = False
    past: int = 0
    cache: Any = None
    evidence: dict[str, Tensor] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def copy(self) -> "Frame":
        """The frame as it stands, whatever is found out after."""
        return replace(self, decisions=dict(self.decisions), evidence=dict(self.evidence), read=set(self.read))


class SoundMask(NamedTuple):
    """Which of the sound that a model was given is real; its layers read frames of it.

    Attributes:
        samples: `[B, n]`.
        model: what knows how many frames that makes.
    """

    samples: Tensor
    model: nn.Module

    def frames(self, length: int) -> Tensor:
        return self.model._get_feature_vector_attention_mask(length, self.samples)


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.towers: dict[str, Frame] = {}  # those that have run, for what is projected from them
        self.forced: Any = None
        self.deciding = False
        self.records: Optional[list[tuple[str, str, Decision]]] = None


class RoutingState:
    """What the hooks of one model and its routed layers share. Each thread has its own; copies start empty."""

    def __init__(self) -> None:
        self.local = _Local()

    def __reduce__(self) -> Any:
        return RoutingState, ()

    def __deepcopy__(self, memo: dict) -> "RoutingState":
        return memo.setdefault(id(self), RoutingState())

    def hold(self) -> Callable[[], AbstractContextManager]:
        """What the next layer would find now, for any thread to come back to, as often as it takes."""
        local = self.local
        return functools.partial(self._resumed, local.frames[-1].copy() if local.frames else None, local.forced)

    @contextmanager
    def _resumed(self, frame: Optional[Frame], forced: Any) -> Iterator[None]:
        local = self.local
        before = local.frames, local.forced, local.records
        local.frames, local.forced, local.records = [frame.copy()] if frame else [], forced, None
        try:
            yield
        finally:
            local.frames, local.forced, local.records = before


class OpenFrame:
    """Forward pre-hook of a model: opens its frame; where samples cannot be told apart, of all as one. A `tower`
    shares none with what it is a part of.
    """

    def __init__(self, state: RoutingState, model: PreTrainedModel, outermost: bool, together: bool, tower: str):
        self.state, self.outermost, self.together, self.tower = state, outermost, together, tower
        self.answers = model.can_generate() and not model.config.is_encoder_decoder
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.main_input = model.main_input_name

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args))
        given.update(kwargs)
        frames = self.state.local.frames
        if self.outermost:
            frames.clear()  # an interrupt leaves what was open
        if not frames and model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep_routes(model, self.state.hold)
        if not torch.compiler.is_compiling() and _asks_for_more(model, given):
            capture_once(model)
        parent = frames[-1] if frames and not self.tower else None
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        first = given.get(self.main_input)
        for name in ("inputs_embeds", "decoder_input_ids", "input_ids", "encoder_outputs", "decoder_inputs_embeds"):
            first = given.get(name) if first is None else first
        first = first if first is None or isinstance(first, Tensor) else first[0]
        batch = first.shape[0] if first is not None else parent.batch if parent else 1  # which the model refuses
        frame = Frame(
            1 if self.together else batch,
            given.get("attention_mask"),
            given.get("encoder_attention_mask"),
            given.get("encoder_hidden_states"),
            cache=cache,
        )
        if frame.mask is not None and hasattr(model, "_get_feature_vector_attention_mask"):
            frame.mask = SoundMask(frame.mask, model)
        if parent is not None and (cache is None or parent.cache is cache or parent.cache is None):
            frame.decisions, frame.decoding, frame.past = parent.decisions, parent.decoding, parent.past
            frame.evidence, frame.prompt, frame.read = parent.evidence, parent.prompt, parent.read
        else:
            _take_up(frame, given, cache)
            if self.answers:
                frame.prompt = _prompt(given)
        frames.append(frame)


def _asks_for_more(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether hidden states or attentions are wanted beside a model's output."""
    names = ("output_hidden_states", "output_attentions")
    return any(given.get(name, getattr(model.config, name, False)) for name in names)


def _take_up(frame: Frame, given: dict[str, Any], cache: Any) -> None:
    """Go on with the decisions that a cache or an encoder's output carries."""
    read = given.get("encoder_outputs")
    kept = getattr(read, _KEPT, None)
    states = read[0] if read is not None else given.get("encoder_hidden_states")
    if kept is None and states is not None:  # put together anew around the same hidden states
        kept = getattr(states, _KEPT, None)
    if cache is not None:
        ids = given.get("decoder_input_ids")
        for name in ("input_ids", "decoder_inputs_embeds", "inputs_embeds"):
            ids = given.get(name) if ids is None else ids
        found = getattr(cache, _KEPT, None)
        compiling = torch.compiler.is_compiling()  # then no tensor is read: a cache that was emptied is not noticed
        if found and ids is not None and ids.shape[1] == 1 and (compiling or _tokens_in(cache)):
            kept, frame.decoding = found, True
        elif hasattr(cache, "get_seq_length"):
            frame.past = _tokens_in(cache)
            if frame.past and found:
                kept, frame.decoding = found, True
    frame.decisions = {} if kept is None else kept
    if cache is not None:
        setattr(cache, _KEPT, frame.decisions)


def _tokens_in(cache: Any) -> int:
    """How many tokens a cache has read; where it does not count them, 1 if it has any."""
    if not hasattr(cache, "get_seq_length"):
        return 1
    try:
        return int(cache.get_seq_length())
    except ValueError:  # its layers keep a state alone
        return int(cache.has_previous_state())


def _prompt(given: dict[str, Any]) -> Optional[Tensor]:
    """The tokens that a language model reads before it answers, where labels say which they are: generating decides
    on them, and keeps to it.
    """
    labels, read = given.get("labels"), given.get("input_ids")
    read = given.get("inputs_embeds") if read is None else read
    if labels is None or read is None or labels.shape != read.shape[:2]:
        return None
    return (labels == -100).cumprod(1).bool()


class CloseFrame:
    """Forward hook of a model: closes its frame, and leaves the decisions with what the next pass is given."""

    def __init__(self, state: RoutingState, tower: str):
        self.state, self.tower = state, tower

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        frames = self.state.local.frames
        if not frames:
            return
        frame = frames.pop()
        if self.tower:
            self.state.local.towers[self.tower] = Frame(frame.batch, decisions=frame.decisions)
        caches = [getattr(output, name, None) for name in _CACHES]
        if found := [cache for cache in caches if cache is not None and not isinstance(cache, tuple)]:
            setattr(found[0], _KEPT, frame.decisions)
        elif not frames and hasattr(output, "last_hidden_state"):  # an encoder that `generate` calls by itself
            setattr(output, _KEPT, frame.decisions)
            if not torch.compiler.is_compiling():
                setattr(output.last_hidden_state, _KEPT, frame.decisions)


# Their layers read `[tokens, samples, features]`.
TOKENS_FIRST = ("fsmt", "led", "longformer", "xlnet")


def _nested_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """A Transformers model and all those nested in it, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def inseparable(model: nn.Module) -> Optional[str]:
    """Why the samples that a model's layers read cannot be told apart; None if they can. One expert for all samples
    of a batch can be added all the same.
    """
    for module in _nested_models(model).values():
        if type(module).__name__.endswith("ForMultipleChoice"):
            return f"A {type(module).__name__} reads several texts for each sample"
        parts = {} if towers(module) else module.config.sub_configs
        if "text_config" in parts and len(parts) > 1:
            return f"A {type(module).__name__} reads text beside something else, of which there may be more or less"
        if module.config.model_type in TOKENS_FIRST:
            return f"The layers of a {type(module).__name__} read tokens first, then samples"
    return None


def check_separable(model: nn.Module) -> None:
    """Refuse a router over a model whose samples cannot be told apart."""
    if why := inseparable(model):
        raise HfEsmError(
            f"{why}: its samples cannot be told apart, so that no router finds their tasks. Merge it without experts "
            "(`method='esm'`), or take `router: oracle` and name one task per batch."
        )


def install(model: nn.Module, state: RoutingState) -> None:
    """Hooks on a model and on all models nested in it."""
    nested, together, apart = _nested_models(model), inseparable(model) is not None, towers(model)
    if "" not in nested:
        raise HfEsmError(f"Routed experts need a Transformers model, not a {type(model).__name__}.")
    for name, module in nested.items():
        tower = name if name in apart else ""
        module.register_forward_pre_hook(OpenFrame(state, module, module is model, together, tower), with_kwargs=True)
        module.register_forward_hook(CloseFrame(state, tower), with_kwargs=True, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Remove what `install` put there."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (OpenFrame, CloseFrame)):
                    for table in (
                        hooks,
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        table.pop(key, None)


def vote(adapter: str, frame: Frame) -> Optional[Decision]:
    """What most modules of the encoder decided, by their prototypes; None if there were none."""
    key = adapter, "the encoder's vote"
    if key not in frame.decisions:
        found = [d for by, d in frame.decisions.items() if isinstance(by, tuple) and by[0] == adapter]
        if not found:
            return None
        votes = [F.one_hot(d.route.experts, d.probabilities.shape[1]).float() for d in found]
        shares = torch.stack([vote.to(votes[0].device) for vote in votes]).mean(0)
        frame.decisions[key] = Decision(Route(shares.argmax(-1)), shares)
    return frame.decisions[key]


class Named(NamedTuple):
    """What the caller of `route(…)` wants, by name.

    Attributes:
        names: a task for all samples, or one for each.
        routes: the same as a route, by the tasks of each adapter; of one sample where one name is for all. Tensors
            once and for all: compiled code is not compiled again for other names.
    """

    names: str | list[str]
    routes: dict[tuple[str, ...], Optional[Route]]

    @classmethod
    def of(cls, names: str | list[str], adapters: Iterable[Sequence[str]]) -> "Named":
        listed = [names] if isinstance(names, str) else names
        return cls(names, {tuple(tasks): _route_of(listed, tasks) for tasks in adapters})


def _route_of(names: list[str], tasks: Sequence[str]) -> Optional[Route]:
    """The tasks of the samples as one adapter counts them; those that it has not get no expert, as `"static"` does."""
    if not set(names) & set(tasks):
        return None
    experts = torch.tensor([tasks.index(name) if name in tasks else 0 for name in names])
    weights = torch.tensor([float(name in tasks) for name in names])
    return Route(experts, None if bool(weights.all()) else weights)


def forced_route(forced: Any, tasks: Sequence[str], batch: int, device: torch.device, frame: Frame) -> Optional[Route]:
    """The route that the caller of `route(…)` wants; None for the static model."""
    found = forced.routes[tuple(tasks)] if isinstance(forced, Named) else forced
    if found is None:
        return None
    found = found.to(device)
    if isinstance(forced, Named) and isinstance(forced.names, str):
        return found.for_batch(batch)
    if len(found.experts) != batch and frame.cache is None and frame.encoder_states is None:  # no beams
        raise HfEsmError(f"Routes of {len(found.experts)} samples do not fit a batch of {batch}. {ONE_PER_SAMPLE}")
    return found.for_batch(batch)
