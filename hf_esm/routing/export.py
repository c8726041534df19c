"""The experts of a routed model, written as LoRA adapters that load without hf_esm."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoints import HEAD_WEIGHTS, HEADS_FOLDER, read_modules, write_lora_adapter
from ..errors import HfEsmError
from ..tuners.routed import RoutedExpertsLayer
from ..utils import add_folders, new_folder, publish_folder, read_tensors, recover, staging_folder
from .experts import RoutedExperts, load_experts


if TYPE_CHECKING:
    from .model import RoutedModel


def export_experts(
    routed: "RoutedModel", output: Path, tasks: Iterable[str], heads: bool, base_model: Optional[str]
) -> dict[str, Path]:
    """See `RoutedModel.export_lora`. All adapters are written, or none.

    Args:
        heads: whether adapters have the class and the head of their task.
        base_model: Hub id of the static model; by default the place that the model was loaded from.
    """
    source, experts = routed._source, load_experts(routed.folder)
    modules = read_modules(routed.folder, str(routed.folder))
    tasks = list(dict.fromkeys(tasks))
    recover(output)
    for task in tasks:
        new_folder(output / task)
    with staging_folder(output) as staging:
        for task in tasks:
            head = routed.folder / HEADS_FOLDER / task / HEAD_WEIGHTS
            model = routed.task_model(task) if heads else routed.model.get_base_model()
            _write(
                staging / task,
                model,
                experts,
                task,
                read_tensors(head) if heads and head.is_file() else {},
                base_model=base_model or source.repo_id or str(routed.folder.absolute()),
                base_revision=None if base_model else source.revision,
            )
            if routed.processor is not None:
                routed.processor.save_pretrained(staging / task)
            if modules is not None and type(model) is type(routed.model.get_base_model()):
                modules.save(staging / task, modules.tensors.__getitem__)
        if not output.exists():
            publish_folder(staging, output)
        else:
            add_folders(staging, output)
    return {task: output / task for task in tasks}


def _write(
    folder: Path,
    model: PreTrainedModel,
    experts: RoutedExperts,
    task: str,
    head: dict[str, Tensor],
    *,
    base_model: str,
    base_revision: Optional[str],
) -> None:
    """Write the expert of one task as an adapter of the class of `model`.

    Args:
        folder: must not exist yet.
        model: the task's model around the routed body, or the static model.
        head: weights of the task's head, by their names in `model`, which the adapter replaces.
        base_model, base_revision: name the static model.
    """
    index = experts.tasks.index(task)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedExpertsLayer) and module.name in experts.factors
    }
    factors = {name: experts.factors[layer.name] for name, layer in layers.items()}
    write_lora_adapter(
        folder,
        {name: (a[index], b[index]) for name, (a, b) in factors.items()},
        base_model,
        base_revision=base_revision,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        base_class=type(model),
        replaced=_by_module(model, head, task),
    )


def _by_module(model: PreTrainedModel, head: dict[str, Tensor], task: str) -> dict[str, dict[str, Tensor]]:
    """Sort the weights of a head by the outermost modules that hold nothing else.

    Raises:
        HfEsmError: if a weight is in a module with weights of the body, which PEFT cannot save.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for place, module in model.named_modules():  # outer modules come before inner ones
        names = {f"{place}.{name}" for name in module.state_dict()}
        inside = any(place.startswith(f"{outer}.") for outer in modules)
        if place and names and names <= set(head) and not inside and not isinstance(module, nn.ModuleList):
            modules[place] = {name.removeprefix(f"{place}."): head[name] for name in names}
    held = {f"{place}.{name}" for place, parts in modules.items() for name in parts}
    if apart := sorted(set(head) - held):
        raise HfEsmError(
            f"The head of {task!r} has '{apart[0]}' in a module of the body, and adapters replace whole modules. Pass "
            "`heads=False` (--no-heads) for an adapter of the static model, without the head."
        )
    return modules
