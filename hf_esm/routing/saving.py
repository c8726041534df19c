"""A routed model in memory, written to disk with the experts and heads that were trained."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..checkpoints import (
    GENERATION_CONFIG,
    HEAD_WEIGHTS,
    HEADS_FOLDER,
    ROUTED_FOLDER,
    ModelSource,
    load_processor,
    open_checkpoint,
)
from ..errors import HfEsmError
from ..hub import write_hashes
from ..planning import check_replaceable
from ..tuners.routed import RoutedExpertsModel
from ..utils import in_place, publish_folder, read_tensors, reading, staging_folder
from .adapters import adapter_tensors, check_alone, static_name


def trained_tensors(
    folder: Path, model: PeftModel, adapter: str, task_models: Mapping[str, PreTrainedModel]
) -> dict[str, dict[str, Tensor]]:
    """Tensors of the adapter and of the heads, by file in `folder`, for files that store other values.

    Raises:
        HfEsmError: if there are other adapters, or experts are gone.
    """
    check_alone([model, *task_models.values()], adapter)
    trained = {}
    of_adapter = [part for name, part in model.named_modules() if RoutedExpertsModel.prefix in name.rpartition(".")[2]]
    with in_place(*of_adapter):
        path = f"{ROUTED_FOLDER}/{SAFETENSORS_WEIGHTS_NAME}"
        trained |= _changed(folder, path, adapter_tensors(model, adapter))
    for task, head in task_models.items():
        path = f"{HEADS_FOLDER}/{task}/{HEAD_WEIGHTS}"
        if (folder / path).is_file():
            places = {name.rpartition(".")[0] for name in read_tensors(folder / path)}
            with in_place(*(module for place, module in head.named_modules() if static_name(place) in places)):
                state = {static_name(name): tensor for name, tensor in head.state_dict().items()}
                trained |= _changed(folder, path, state)
    return trained


def _changed(folder: Path, path: str, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file as they are in a state, by the file's path in `folder`; empty if the file holds these."""
    stored = read_tensors(folder / path)
    if gone := sorted(stored.keys() - state.keys()):
        raise HfEsmError(
            f"'{gone[0]}' of {path} is gone from the model in memory: merging or unloading an adapter on top takes "
            f"experts along. Load the model again: `RoutedModel.from_pretrained('{folder}')`."
        )
    tensors = {name: state[name].to("cpu", copy=True).contiguous() for name in stored}
    equal = all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in tensors.items())
    return {} if equal else {path: tensors}


def check_static(source: ModelSource, static: PreTrainedModel) -> None:
    """Raise an error if a weight of the static model is not what its folder holds: experts belong to these weights.

    Args:
        source: the folder of the model.
        static: the static model in memory, with its adapters.
    """
    stored = open_checkpoint(replace(source, repo_id=None, title=str(source.root)))
    owners = {
        static_name(f"{place}.{at}"): (module, at)
        for place, module in static.named_modules(remove_duplicate=False)
        for at, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    for name, live in stored.names.items():
        if live not in owners:  # a module after the Transformer
            continue
        module, at = owners[live]
        with in_place(module):
            tensor = getattr(module, at)
            quantised = not tensor.is_floating_point()
            expected = tensor if quantised else stored.tensor(name).to(tensor.dtype)
            same = expected.shape == tensor.shape and (quantised or torch.equal(expected, tensor.cpu()))
        if not same:
            raise HfEsmError(
                f"'{live}' of the static model was changed since it was loaded, and the experts belong to the model "
                "that it was. Load the model again, and train experts and heads alone: both are saved."
            )


def changed_settings(folder: Path, static: PreTrainedModel, processor: Any, into: Path) -> list[Path]:
    """Write the settings of generation and the tokenizer or processor to `into`, if they differ from what `folder`
    holds.

    Returns the written files.

    Raises:
        HfEsmError: if the tokenizer has tokens that the model has no embeddings for.
    """
    if static.can_generate():
        stored = GenerationConfig.from_model_config(static.config)
        if (folder / GENERATION_CONFIG).is_file():
            with reading(folder / GENERATION_CONFIG):
                stored = GenerationConfig.from_pretrained(folder)
        if static.generation_config.to_diff_dict() != stored.to_diff_dict():
            static.generation_config.save_pretrained(into)
    if processor is not None:
        written = []
        for name, one in (("stored", load_processor(folder)), ("own", processor)):
            if one is not None:
                one.save_pretrained(into / name)
            written.append({path.name: path.read_bytes() for path in (into / name).glob("*")})
        if written[0] != written[1]:
            tokens = len(processor) if hasattr(processor, "__len__") else 0
            rows = getattr(static.get_input_embeddings(), "num_embeddings", tokens)
            if tokens > rows:
                raise HfEsmError(
                    f"The tokenizer has {tokens} tokens, and the model has embeddings of {rows}. Add tokens to "
                    "an expert, and merge again."
                )
            for path in (into / "own").glob("*"):
                shutil.move(path, into / path.name)
        for name in ("stored", "own"):
            shutil.rmtree(into / name, ignore_errors=True)
    return sorted(into.iterdir())


def save_model(
    source: ModelSource,
    folder: Path,
    static: PreTrainedModel,
    processor: Any,
    trained: Mapping[str, dict[str, Tensor]],
    output: Path,
    overwrite: bool,
) -> None:
    """Copy a model's folder to `output`, with the tensors of `trained_tensors` and the files of `changed_settings` in
    place of those that it has.

    Raises:
        HfEsmError: if `output` cannot be replaced; see `check_static` and `changed_settings`.
    """
    check_replaceable(output, overwrite)
    check_static(source, static)
    with TemporaryDirectory() as written, staging_folder(output) as staging:
        settings = changed_settings(folder, static, processor, Path(written))
        shutil.copytree(folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        for path, tensors in trained.items():
            save_file(tensors, staging / path, {"format": "pt"})
        for path in settings:
            shutil.copy(path, staging / path.name)
        if trained or settings:
            write_hashes(staging)
        publish_folder(staging, output, overwrite)


def check_settings(folder: Path, static: PreTrainedModel, processor: Any) -> None:
    """Refuse settings of generation, and a tokenizer or processor, that differ from what `folder` holds."""
    with TemporaryDirectory() as written:
        if changed := changed_settings(folder, static, processor, Path(written)):
            raise HfEsmError(
                f"{changed[0].name} was changed since it was loaded. Call save_pretrained, load the saved model with "
                "RoutedModel.from_pretrained, and push that."
            )
