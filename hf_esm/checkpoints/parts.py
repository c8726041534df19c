"""Checkpoints made of another one: a task of a routed model, and a fine-tune of one part of a base."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import body_prefix, canonical_names, from_matrices, ties, to_matrices, towers, untie
from ..utils import check_known, read_tensors, reading
from .adapter_settings import read_routed_settings
from .base import Checkpoint, build_skeleton
from .layout import ADAPTER_WEIGHTS, BASE_WEIGHTS, BODY_WEIGHTS, HEAD_WEIGHTS, HEADS_FOLDER, ROUTED_FOLDER
from .written import load_written


class DerivedCheckpoint(Checkpoint):
    """A checkpoint in which some weights of another one are changed.

    Attributes:
        base: the other checkpoint.
    """

    base: Checkpoint

    def load_model(self, **placement: Any) -> PreTrainedModel:
        if placement:
            return load_written(self, **placement)
        model = self.base.load_model_as(type(self.skeleton), self.config)
        self.put_on(model)
        return model.eval()

    def put_on(self, model: PreTrainedModel) -> None:
        """Write the weights that differ from the base's into a model that holds the base's."""
        untie(model, self.names.values())
        state = model.state_dict()
        for name, live in self.names.items():
            if self.changes(name):
                state[live].copy_(self.tensor(name))

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        raise NotImplementedError("this is an expert, never a base")


class RoutedTask(DerivedCheckpoint):
    """One task of a routed model: the static model, the factors of the task's expert over it, and the task's head.

    Weights are `W_M + B_t A_t`. A compressed expert has other weights of its own, too (see `write_body`). The update
    over the base of another merge is `W_M + B_t A_t − W0`.

    Attributes:
        base: the static model, as a model of the task's class reads it.
        folder: folder of the routed model.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        task: str,
        static: Checkpoint,
        task_class: Callable[[Path], tuple[PretrainedConfig, type[PreTrainedModel]]],
    ):
        """Read the expert and the head.

        Args:
            folder: folder of the routed model.
            title: name of the task's expert in messages.
            task: name of the task.
            static: the static model in that folder.
            task_class: returns the config and the class of a head, from its folder.

        Raises:
            HfEsmError: if the model has no such task.
        """
        self.folder, self.title = folder, title
        tasks = read_routed_settings(folder, title).tasks
        check_known([task], tasks, "task", title)
        head = folder / HEADS_FOLDER / task
        config, model_class = task_class(head) if head.is_dir() else (static.config, type(static.skeleton))
        self.base = static.seen_as(model_class, config)
        self._head = read_tensors(head / HEAD_WEIGHTS) if (head / HEAD_WEIGHTS).is_file() else {}
        self._body = read_tensors(head / BODY_WEIGHTS) if (head / BODY_WEIGHTS).is_file() else {}
        self._bases = folder / HEADS_FOLDER / BASE_WEIGHTS
        self.skeleton = build_skeleton(model_class, config, [*self._head, *self.base.names.values()])
        self._factors = _factors(folder, static, tasks.index(task))
        expected = canonical_names(self.skeleton)
        self.names = {n: live for n, live in expected.items() if live in self._head or n in self.base.names}
        self.missing = [name for name in self.base.missing if name not in self.names]
        self.extra = []

    @property
    def kind(self) -> str:
        return f"task of a routed {type(self.base.skeleton).__name__}"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._head[self.names[name]].shape) if self._of_head(name) else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._head[self.names[name]].dtype if self._of_head(name) else self.base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self._exact(name).to(self.dtype(name))

    def update(self, name: str, base: Tensor, out: Optional[Tensor] = None) -> Tensor:
        return self._exact(name).to(base.device, torch.float32) - base.float()

    def _of_head(self, name: str) -> bool:
        return self.names[name] in self._head

    def _exact(self, name: str) -> Tensor:
        """Return a weight, not rounded to its dtype."""
        if self._of_head(name):
            return self._head[self.names[name]]
        live, linear = self.names[name], self.base.linear.get(name)
        if live in self._body:
            return self._body[live]
        if f"{live}/A" in self._body:
            with reading(self._bases), safe_open(self._bases, "pt") as file:
                weight = file.get_tensor(name)
            factors = [self._body.get(f"{live}/{factor}") for factor in "AB"]
        elif name in self._factors:
            weight, factors = self.base.tensor(name), [factor[None] for factor in self._factors[name]]
        else:
            return self.base.tensor(name)
        with reading(self.folder, f"{self.title}: its expert of '{live}'"):  # factors of other shapes than the weight
            matrices = zip(to_matrices(weight, linear), *factors, strict=True)
            return from_matrices([matrix.float() + b @ a for matrix, a, b in matrices], linear)


def write_body(
    folder: Path,
    task: str,
    expert: Checkpoint,
    base: Checkpoint,
    names: Iterable[str],
    compress: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Write the weights of a task's body that no routed expert holds, beside its head: matrices as factors `A` and `B`
    of their updates over the base, all others (biases, norms, convolutions) as they are.

    Args:
        folder: folder of the merged model.
        task: task of the expert.
        expert: the expert.
        base: the base that its updates are over. Weights that the folder holds for other tasks come first.
        names: canonical names of the weights.
        compress: returns `A [r, d_in]` and `B [d_out, r]` of an update `[d_out, d_in]`.
    """
    body: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    path = folder / HEADS_FOLDER / BASE_WEIGHTS
    known = read_tensors(path) if path.is_file() else {}
    for name in names:
        linear, live = base.linear.get(name), expert.names[name]
        weight = known[name] if name in known else base.tensor(name)
        update = expert.residual(name, weight)
        if name not in base.trained or (linear is None and update.dim() != 2):
            body[live] = (weight.float() + update).to(weight.dtype)
            continue
        factors = [compress(matrix) for matrix in to_matrices(update, linear)]
        body[f"{live}/A"], body[f"{live}/B"] = (torch.stack(part) for part in zip(*factors, strict=True))
        bases[name] = weight.contiguous()
    if bases.keys() - known.keys():
        save_file(known | bases, path, {"format": "pt"})
    save_file({name: t.contiguous() for name, t in body.items()}, folder / HEADS_FOLDER / task / BODY_WEIGHTS)


def _factors(folder: Path, static: Checkpoint, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `A [r, d_in]` and `B [d_out, r]` of one expert, float32, by the canonical name of the weight."""
    names = {live: name for name, live in static.names.items()}
    path = folder / ROUTED_FOLDER / ADAPTER_WEIGHTS
    with reading(path):
        tensors = {
            key.removeprefix("base_model.model."): tensor[index].float()
            for key, tensor in read_tensors(path).items()
            if key.endswith((".routed_experts_A", ".routed_experts_B"))
        }
        modules = sorted({key.rpartition(".")[0] for key in tensors})
        return {
            names[f"{module}.weight"]: (tensors[f"{module}.routed_experts_A"], tensors[f"{module}.routed_experts_B"])
            for module in modules
        }


class PartExpert(DerivedCheckpoint):
    """A fine-tune of one part of the base, such as the language model of a vision-language model, as a fine-tune of
    the whole base that leaves the rest alone.

    Attributes:
        expert: checkpoint of the part.
        base: the base.
    """

    def __init__(self, expert: Checkpoint, base: Checkpoint, inner_names: dict[str, str]):
        """Take the weights of the part by their names in the base.

        Args:
            expert: checkpoint of the part.
            base: the base.
            inner_names: canonical names of weights in the expert by those in the base.
        """
        self.expert, self.base, self._inner, self.title = expert, base, inner_names, expert.title
        self.skeleton = build_skeleton(type(base.skeleton), base.config, [*base.names.values(), *inner_names])
        held = {name: live for name, live in canonical_names(self.skeleton).items() if name in inner_names}
        self.names, self.missing, self.extra = {**base.names, **held}, [], expert.extra
        self.quantised = expert.quantised

    @property
    def kind(self) -> str:
        return self.expert.kind

    def changes(self, name: str) -> bool:
        return name in self._inner and self.expert.changes(self._inner[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.expert.shape(self._inner[name]) if name in self._inner else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.expert.dtype(self._inner[name]) if name in self._inner else self.base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self.expert.tensor(self._inner[name]) if name in self._inner else self.base.tensor(name)

    def update(self, name: str, base: Tensor, out: Optional[Tensor] = None) -> Tensor:
        if name not in self._inner:
            return torch.zeros_like(base, dtype=torch.float32)
        return self.expert.update(self._inner[name], base, out)

    def residual(self, name: str, merged: Tensor) -> Tensor:
        if name not in self._inner:
            return self.base.residual(name, merged)
        return self.expert.residual(self._inner[name], merged)

    def factors(self, name: str) -> Optional[tuple[Tensor, Tensor]]:
        return self.expert.factors(self._inner[name]) if name in self._inner else None

    def extra_tensors(self) -> dict[str, Tensor]:
        return self.expert.extra_tensors()


class PartOfBase(Checkpoint):
    """A part of a checkpoint, such as the language model of a vision-language model, as a model of its own."""

    def __init__(self, whole: Checkpoint, place: str, model_class: type[PreTrainedModel], config: PretrainedConfig):
        """Take the weights of the part by the names that they have in a model of its class.

        Args:
            whole: the checkpoint.
            place: name of the module that is the body of the part.
            model_class: class of the part.
            config: settings of the part.
        """
        self.whole, self.place = whole, place
        self.title, self.source, self.revision = whole.title, whole.source, whole.revision
        names_of_whole = {live: name for name, live in whole.names.items()}
        self.skeleton = build_skeleton(model_class, config)
        untie(self.skeleton, [t for t in ties(self.skeleton) if _moved(t, self.skeleton, place) in names_of_whole])
        expected = canonical_names(self.skeleton)
        moved = {name: _moved(live, self.skeleton, place) for name, live in expected.items()}
        self._outer = {name: names_of_whole[live] for name, live in moved.items() if live in names_of_whole}
        state = self.skeleton.state_dict()
        fits = {name for name in self._outer if self.shape(name) == state[expected[name]].shape}
        self.names = {name: live for name, live in expected.items() if name in fits}
        self.missing, self.extra = [name for name in expected if name not in fits], []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(self._outer[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.whole.dtype(self._outer[name])

    def tensor(self, name: str) -> Tensor:
        return self.whole.tensor(self._outer[name])

    def seen_as(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> Checkpoint:
        return PartOfBase(self.whole, self.place, model_class, config)


def parts_of(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the parts of a model that have a config of another class than it has, by the names of their modules."""
    modules = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    return {name: part for name, part in modules if name and type(part.config) is not type(model.config)}


def _moved(live: str, skeleton: PreTrainedModel, place: str) -> str:
    """Return the name that a weight of a part has in the whole: weights of the body are those of the module there."""
    prefix = body_prefix(skeleton)
    return f"{place}.{live.removeprefix(prefix)}" if live.startswith(prefix) else live


def part_of_base(expert: Checkpoint, base: Optional[Checkpoint]) -> Checkpoint:
    """Return an expert that is a fine-tune of one part of the base as one of the whole base; any other as it is.

    Its body is a part of the base if the base has a module of its class, inside another module. The body's weights are
    those of that module, and other weights, such as the output map, those of the same names. The encoders of a model
    such as CLIP read samples of their own, which the whole base does not run on, and are not parts in this sense.
    """
    if base is None or type(expert.config) is type(base.config):
        return expert
    body = getattr(expert.skeleton, body_prefix(expert.skeleton).rstrip("."), expert.skeleton)
    places = [name for name, part in parts_of(base.skeleton).items() if type(part) is type(body)]
    if len(places) != 1 or places[0] in towers(base.skeleton):
        return expert
    names_of_base, inner = {live: name for name, live in base.names.items()}, {}
    for name, live in expert.names.items():
        moved = _moved(live, expert.skeleton, places[0])
        if moved in names_of_base:
            inner[names_of_base[moved]] = name
        elif moved in ties(base.skeleton):
            inner[moved] = name  # the part holds a head that is tied in the base
        elif moved not in base.skeleton.state_dict():
            return expert  # it has a weight that the base has no place for
    return PartExpert(expert, base, inner)
