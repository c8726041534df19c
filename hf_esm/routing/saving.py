"""A routed model in memory, written to disk: trained experts and heads, and experts as LoRA adapters."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoints import HEAD_WEIGHTS, HEADS_FOLDER, ROUTED_FOLDER, ModelSource, write_lora_adapter
from ..hub import write_hashes
from ..planning import check_replaceable
from ..utils import new_folder, publish_folder, staging_folder
from .experts import load_experts


def trained_tensors(
    folder: Path, model: PeftModel, task_models: Mapping[str, PreTrainedModel]
) -> dict[str, dict[str, Tensor]]:
    """Tensors of the adapter and of the heads, by file in `folder`, for files that store other values."""
    states = {f"{ROUTED_FOLDER}/{SAFETENSORS_WEIGHTS_NAME}": get_peft_model_state_dict(model)}
    states |= {f"{HEADS_FOLDER}/{task}/{HEAD_WEIGHTS}": head.state_dict() for task, head in task_models.items()}
    trained = {}
    for path, state in states.items():
        stored = load_file(folder / path) if (folder / path).is_file() else {}
        tensors = {name: state[name].cpu().contiguous() for name in stored}
        if any(not torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in tensors.items()):
            trained[path] = tensors
    return trained


def save_copy(folder: Path, output: Path, trained: Mapping[str, dict[str, Tensor]], overwrite: bool) -> None:
    """Copy a model's folder to `output`, with the tensors of `trained_tensors` in place of those in their files."""
    check_replaceable(output, overwrite)
    with staging_folder(output) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        if trained:
            for path, tensors in trained.items():
                save_file(tensors, staging / path, {"format": "pt"})
            write_hashes(staging)
        publish_folder(staging, output, overwrite)


def export_experts(
    folder: Path, static: PreTrainedModel, source: ModelSource, output: Path, tasks: Iterable[str]
) -> dict[str, Path]:
    """Write experts of the model in `folder` as LoRA adapters over the static model, to `output/TASK`.

    Args:
        source: names the base model of the adapters, if it is on the Hub; else `folder` is.
    """
    experts = load_experts(folder)
    transposed = any(isinstance(static.get_submodule(m).get_base_layer(), Conv1D) for m in experts.factors)
    tasks = list(dict.fromkeys(tasks))
    for task in tasks:
        new_folder(output / task)
    adapters = {}
    for task in tasks:
        index = experts.tasks.index(task)
        adapters[task] = write_lora_adapter(
            output / task,
            {module: (a[index], b[index]) for module, (a, b) in experts.factors.items()},
            source.repo_id or str(folder.absolute()),
            base_revision=source.revision,
            fan_in_fan_out=transposed,
            base_class=type(static),
        )
    return adapters
