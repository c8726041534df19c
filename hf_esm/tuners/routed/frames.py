"""Frames: what layers know about the forward pass that runs them, and the hooks that open and close frames.

A layer sees nothing but its input: neither which rows are padding, nor what other layers decided. Hooks on the model,
and on every model nested in it, therefore keep a stack of frames for each thread. Layers read the mask from the
topmost frame, and leave their decisions in it. With a KV cache, decisions stay on the cache object: the prompt
decides, and decoding reuses its decisions. The towers of a model that compares two kinds of input, such as CLIP, read
separate samples, and decide separately.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...architecture import towers
from ...errors import HfEsmError
from ...utils import remove_hooks
from ..base import recorded
from .calls import check_output_map, check_trains, packed_rows
from .capturing import capture_once
from .checkpointing import keep_routes
from .padding import mask_of_padding
from .routes import Decision, Decisions
from .separability import inseparable, nested_models


# Attribute of a cache, or of an encoder's output, with the decisions between the passes of one generation.
_DECISIONS = "_hf_esm_decisions"


# Arguments for caches; `cache_params` is that of models with a state of fixed size.
_CACHES = ("past_key_values", "cache_params")


@dataclass
class Frame:
    """One forward pass of a model.

    Attributes:
        batch: number of samples.
        mask: attention mask, in the form in which the model got it.
        encoder_mask: attention mask of `encoder_states`.
        encoder_states: the encoder's hidden states, which cross-attention reads.
        prompt: `[B, n]` bool, False from the first token on that is scored (labels); None without labels.
        decisions: by adapter (one decision per sample), or by adapter and module.
        decoding: whether decisions of an earlier pass hold.
        past: number of tokens in the cache before this pass.
        cache: the cache object.
        evidence: by adapter, sums that readers leave for the module that decides.
        read: names of modules that have run.
        packed: why a row holds several samples; "" if none does.
        module: the model that runs.
        entered: whether its `forward` runs by now.
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
    packed: str = ""
    module: Optional[nn.Module] = None
    entered: bool = False

    def copy(self) -> "Frame":
        """The frame at this moment, which later decisions do not change."""
        return replace(self, decisions=dict(self.decisions), evidence=dict(self.evidence), read=set(self.read))


class SoundMask(NamedTuple):
    """Mask of the sound that a model reads; its layers read frames, which are fewer.

    Attributes:
        samples: mask of the sound samples, `[B, n]`.
        model: computes the mask of frames from the mask of sound samples.
    """

    samples: Tensor
    model: nn.Module

    def frames(self, length: int) -> Tensor:
        """Mask of `length` frames, `[B, length]`."""
        return self.model._get_feature_vector_attention_mask(length, self.samples)


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.towers: dict[str, Frame] = {}  # of towers that have run, for the projections behind them
        self.forced: Any = None  # the route of the request that runs
        self.prompt_length: Any = None
        self.deciding = False
        self.records: Optional[list[tuple[str, str, Decision]]] = None


class RoutingState:
    """State that the hooks of one model share with its routed layers; copies start empty.

    A route, and a prompt's length, belong to a request: they are context variables, which asyncio tasks and
    `asyncio.to_thread` inherit and threads started by hand do not. Compiled code cannot read a context variable, so
    that `load` copies them into `local`, which each thread has for itself, before the model runs.
    """

    def __init__(self) -> None:
        self.local = _Local()
        self.route: ContextVar[Any] = ContextVar("hf_esm_route", default=None)
        self.prompt_length: ContextVar[Any] = ContextVar("hf_esm_prompt_length", default=None)

    def load(self) -> None:
        """Copy what belongs to the request into this thread's state; compiled code keeps what was copied before it."""
        if not torch.compiler.is_compiling():
            self.local.forced, self.local.prompt_length = self.route.get(), self.prompt_length.get()

    @contextmanager
    def request(self, variable: ContextVar[Any], value: Any) -> Iterator[None]:
        """Set a context variable for the request inside the block."""
        before = variable.get()
        variable.set(value)
        self.load()
        try:
            yield
        finally:
            variable.set(before)  # not by the token: a generator may be closed in another context
            self.load()

    def __reduce__(self) -> Any:
        return RoutingState, ()

    def __deepcopy__(self, memo: dict) -> "RoutingState":
        return memo.setdefault(id(self), RoutingState())

    def hold(self) -> Callable[[], AbstractContextManager]:
        """Keep the state of this moment. The result opens a context with that state, in any thread, any number of
        times.
        """
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
    """Forward pre-hook of a model: opens a frame.

    Args:
        state: of the outermost model.
        model: the model with the hook.
        outermost: whether no other model contains it.
        together: whether its samples cannot be told apart, so that a batch counts as one sample.
        tower: name of the tower, or "". A tower does not share the frame of the model that contains it.
    """

    def __init__(self, state: RoutingState, model: PreTrainedModel, outermost: bool, together: bool, tower: str):
        self.state, self.outermost, self.together, self.tower = state, outermost, together, tower
        self.answers = model.can_generate() and not model.config.is_encoder_decoder
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.main_input = model.main_input_name

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self.names, args))
        inputs.update(kwargs)
        frames = self.state.local.frames
        if self.outermost:
            frames.clear()  # an interrupted pass leaves its frames
        if not frames:
            _check_replica(model)
            self.state.load()
        if not torch.compiler.is_compiling():
            self._prepare(model, inputs)
        parent = frames[-1] if frames and not self.tower else None
        cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
        frame = Frame(
            1 if self.together else self._batch(inputs, parent),
            inputs.get("attention_mask"),
            inputs.get("encoder_attention_mask"),
            inputs.get("encoder_hidden_states"),
            cache=cache,
            module=model,
        )
        if frame.mask is not None and hasattr(model, "_get_feature_vector_attention_mask"):
            frame.mask = SoundMask(frame.mask, model)
        if parent is not None and (cache is None or parent.cache is cache or parent.cache is None):
            frame.decisions, frame.decoding, frame.past = parent.decisions, parent.decoding, parent.past
            frame.evidence, frame.prompt, frame.read = parent.evidence, parent.prompt, parent.read
            frame.packed = parent.packed
        else:
            _resume_decisions(frame, inputs, cache)
            if not frame.decoding and not recorded():
                frame.packed = packed_rows(inputs, frame.batch)
            local = self.state.local
            if isinstance(local.forced, Decisions):
                frame.decisions.update(local.forced.by_key)
                frame.decoding = True
            elif local.prompt_length is not None:
                frame.prompt = _prompt_of_length(inputs, local.prompt_length)
            elif self.answers:
                frame.prompt = _prompt(inputs)
        if frame.mask is None and not frame.decoding and not recorded():
            frame.mask = mask_of_padding(model.config, inputs.get("input_ids"))
        frames.append(frame)

    def _prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """See to what a pass needs beside its frame: gradients, and outputs of layers."""
        if not self.state.local.frames and model.training and torch.is_grad_enabled():
            check_trains(model, inputs)
            keep_routes(model, self.state.hold)
        if _returns_layers(model, inputs):
            capture_once(model)

    def _batch(self, inputs: Mapping[str, Any], parent: Optional[Frame]) -> int:
        """Number of samples in a model's inputs; without any input, 1, and the model itself raises."""
        first = inputs.get(self.main_input)
        for name in ("inputs_embeds", "decoder_input_ids", "input_ids", "encoder_outputs", "decoder_inputs_embeds"):
            first = inputs.get(name) if first is None else first
        first = first if first is None or isinstance(first, Tensor) else first[0]
        return first.shape[0] if first is not None else parent.batch if parent else 1


def _returns_layers(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether a model returns the hidden states or attentions of its layers."""
    names = ("output_hidden_states", "output_attentions")
    return any(inputs.get(name, getattr(model.config, name, False)) for name in names)


def _resume_decisions(frame: Frame, inputs: Mapping[str, Any], cache: Any) -> None:
    """Continue with the decisions on a cache or on an encoder's output."""
    outputs = inputs.get("encoder_outputs")
    decisions = getattr(outputs, _DECISIONS, None)
    states = outputs[0] if outputs is not None else inputs.get("encoder_hidden_states")
    if decisions is None and states is not None:  # a new output object around the encoder's hidden states
        decisions = getattr(states, _DECISIONS, None)
    if cache is not None:
        ids = inputs.get("decoder_input_ids")
        for name in ("input_ids", "decoder_inputs_embeds", "inputs_embeds"):
            ids = inputs.get(name) if ids is None else ids
        cached = getattr(cache, _DECISIONS, None)
        compiling = torch.compiler.is_compiling()  # then no tensor is read, and an emptied cache is not noticed
        if cached and ids is not None and ids.shape[1] == 1 and (compiling or _tokens_in(cache)):
            decisions, frame.decoding = cached, True
        elif hasattr(cache, "get_seq_length"):
            frame.past = _tokens_in(cache)
            if frame.past and cached:
                decisions, frame.decoding = cached, True
    frame.decisions = {} if decisions is None else decisions
    if cache is not None:
        setattr(cache, _DECISIONS, frame.decisions)


def _tokens_in(cache: Any) -> int:
    """Number of tokens that a cache has read; of a cache that does not count them, 1 if it has read any."""
    if not hasattr(cache, "get_seq_length"):
        return 1
    try:
        return int(cache.get_seq_length())
    except ValueError:  # all layers keep a state of fixed size
        return int(cache.has_previous_state())


def _prompt(inputs: Mapping[str, Any]) -> Optional[Tensor]:
    """Mask of the tokens before the first label, `[B, n]`: `generate` decides on the prompt, and so does scoring."""
    labels, tokens = inputs.get("labels"), inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if labels is None or tokens is None or labels.shape != tokens.shape[:2]:
        return None
    return (labels == -100).cumprod(1).bool()


def _prompt_of_length(inputs: Mapping[str, Any], length: int | Sequence[int] | Tensor) -> Optional[Tensor]:
    """Mask of the first tokens of each sample, padding not counted, `[B, n]`.

    Args:
        length: number of tokens of all prompts, or of each.
    """
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None
    samples, count = tokens.shape[:2]
    lengths = torch.as_tensor(length, device=tokens.device).reshape(-1, 1)
    if len(lengths) > 1:
        if samples % len(lengths):
            raise HfEsmError(f"prompt_length names {len(lengths)} prompts, and there are {samples}. Give one each.")
        lengths = lengths.repeat_interleave(samples // len(lengths), dim=0)
    told_apart = isinstance(mask, Tensor) and mask.shape == (samples, count)
    real = mask.bool() if told_apart else torch.ones(samples, count, dtype=torch.bool, device=tokens.device)
    return real & (real.cumsum(1) <= lengths)


def _check_replica(model: nn.Module) -> None:
    """Refuse a replica of `torch.nn.DataParallel`, whose threads have no routes."""
    if getattr(model, "_is_replica", False):
        raise HfEsmError(
            "torch.nn.DataParallel runs copies of the model in threads of its own, where no route holds. Start a "
            "process per GPU: `accelerate launch`."
        )


class CloseFrame:
    """Forward hook of a model: closes its frame, and leaves the decisions on the inputs of the next pass."""

    def __init__(self, state: RoutingState, tower: str):
        self.state, self.tower = state, tower

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        frames = self.state.local.frames
        if not frames:
            return
        frame = frames.pop()
        if output is not None and not frames and not torch.compiler.is_compiling():
            check_output_map(model, frame.read)
        if self.tower:
            self.state.local.towers[self.tower] = Frame(frame.batch, decisions=frame.decisions)
        caches = [getattr(output, name, None) for name in _CACHES]
        if objects := [cache for cache in caches if cache is not None and not isinstance(cache, tuple)]:
            setattr(objects[0], _DECISIONS, frame.decisions)
        elif not frames and hasattr(output, "last_hidden_state"):  # an encoder that `generate` calls by itself
            setattr(output, _DECISIONS, frame.decisions)
            if not torch.compiler.is_compiling():
                setattr(output.last_hidden_state, _DECISIONS, frame.decisions)


def _open_by_name(model_class: type[nn.Module]) -> None:
    """Let a caller of `model.forward(…)`, which skips hooks, get the frames of `model(…)`.

    The class is changed, and not each model: Accelerate and others replace the `forward` of a model, and copies would
    share it. Models without our hooks run as before.
    """
    run = model_class.forward
    if getattr(vars(model_class).get("forward"), "opens_frames", False):
        return

    @functools.wraps(run)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        opens = [hook for hook in self._forward_pre_hooks.values() if isinstance(hook, OpenFrame)]
        if not opens:
            return run(self, *args, **kwargs)
        frames = opens[0].state.local.frames
        if frames and frames[-1].module is self and not frames[-1].entered:  # opened by the hook
            frames[-1].entered = True
            return run(self, *args, **kwargs)
        close = next(hook for hook in self._forward_hooks.values() if isinstance(hook, CloseFrame))
        output = None
        opens[0](self, args, kwargs)
        frames[-1].entered = True
        try:
            output = run(self, *args, **kwargs)
        finally:
            close(self, args, kwargs, output)
        return output

    forward.opens_frames = True
    model_class.forward = forward


def install(model: nn.Module, state: RoutingState) -> None:
    """Add the hooks to a model and to all models nested in it."""
    nested, together, apart = nested_models(model), inseparable(model) is not None, towers(model)
    if "" not in nested:
        raise HfEsmError(f"Routed experts need a Transformers model, not a {type(model).__name__}.")
    for name, module in nested.items():
        tower = name if name in apart else ""
        module.register_forward_pre_hook(OpenFrame(state, module, module is model, together, tower), with_kwargs=True)
        module.register_forward_hook(CloseFrame(state, tower), with_kwargs=True, always_call=True)
        _open_by_name(type(module))


def uninstall(model: nn.Module) -> None:
    """Remove the hooks that `install` added."""
    for module in model.modules():
        remove_hooks(module, lambda hook: isinstance(hook, (OpenFrame, CloseFrame)))
