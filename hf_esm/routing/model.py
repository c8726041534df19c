"""`RoutedModel`: a merged model with its experts, router, heads and processor, from a folder or the Hub."""

import inspect
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture import towers
from ..checkpoints import (
    HEAD_WEIGHTS,
    HEADS_FOLDER,
    ROUTED_FOLDER,
    Access,
    ModelSource,
    attach_head,
    load_processor,
    resolve_class,
    resolve_source,
    whole_folder,
    write_lora_adapter,
)
from ..data import SampleOptions, batch_for, batch_indices, encode, read_rows, reads_singly
from ..errors import HfEsmError
from ..hub import check_routed, push_folder, verify_hashes, write_hashes
from ..planning import check_replaceable
from ..tuners.routed import ONE_PER_SAMPLE, Named, Route, decide, route, routing_state
from ..utils import new_folder, publish_folder, staging_folder
from .editing import add_expert, remove_expert
from .experts import load_experts
from .explanations import Explanation, Prediction, explanation, is_sure, probabilities, take, vote


class RoutedModel:
    """A merged model that adds to each sample the experts of its likeliest tasks (ESM++, arXiv 2606.19164).

    Attributes:
        model: the `PeftModel`; call it, or this object, as any Transformers model.
        folder: where it was loaded from.
        tasks: names of the experts.
        processor: tokenizer or processor, None if there is none.
    """

    def __init__(
        self,
        model: PeftModel,
        folder: Path,
        processor: Any = None,
        source: Optional[ModelSource] = None,
        loading: Optional[Mapping[str, Any]] = None,
    ):
        self.model, self.folder, self.processor, self._loading = model, folder, processor, loading or {}
        self._source = source or ModelSource(str(folder), folder=folder)
        self.config = model.peft_config[model.active_adapter]
        self.tasks: list[str] = self.config.tasks
        self._task_models: dict[str, PreTrainedModel] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
        revision: Optional[str] = None,
        token: Optional[str | bool] = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "RoutedModel":
        """Load what `merge_models(…, method="esm++")` (or `"tsv-c"`) wrote, or `push_to_hub` uploaded.

        Args:
            model: folder or Hub id.
            revision: branch, tag or commit.
            kwargs: passed to the static model's `from_pretrained`: `dtype`, `device_map`, …

        Raises:
            HfEsmError: if it is no routed model, or a file is not what was written.
        """
        folder = whole_folder(model, str(model), revision, token)
        hosted = None if Path(model).expanduser().is_dir() else str(model).partition("@")[0]
        check_routed(folder, str(model))
        verify_hashes(folder, str(model))
        source = resolve_source(str(folder), str(model), Access(trust_remote_code=trust_remote_code))
        config, model_class = resolve_class(source)
        static = model_class.from_pretrained(folder, config=config, **kwargs)
        if away := [name for name, weight in static.named_parameters() if weight.is_meta]:
            raise HfEsmError(
                f"{model}: with this device_map, '{away[0]}' would not stand on a device, and experts would have "
                "nothing to stand beside. Give one that offloads nothing, or a smaller dtype."
            )
        adapted = PeftModel.from_pretrained(static, str(folder / ROUTED_FOLDER)).eval()
        source.repo_id, source.revision = hosted, folder.name if hosted else None
        loading = {"trust_remote_code": trust_remote_code, **kwargs}
        return cls(adapted, folder, load_processor(folder, trust_remote_code), source, loading)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate` of the static model; the prompt decides the route.

        Where the first pass reads something else than the whole prompt (assisted decoding, prompt lookup, prefilling
        in chunks), or every pass reads more (no cache), a discriminant router reads the prompt by itself before.
        """
        base, forced = self.model.get_base_model(), routing_state(self.model).local.forced
        prompt = {base.main_input_name: args[0] if args else kwargs.get("inputs"), **kwargs}
        known = inspect.signature(base.forward).parameters
        prompt = {name: value for name, value in prompt.items() if name in known and isinstance(value, torch.Tensor)}
        size = next((len(value) for value in prompt.values() if value.dim()), None)
        if isinstance(forced, Named) and not isinstance(forced.names, str) and size not in (None, len(forced.names)):
            raise HfEsmError(f"{len(forced.names)} tasks are named for {size} samples. {ONE_PER_SAMPLE}")
        decided, settings = nullcontext(), args[1] if len(args) > 1 else kwargs.get("generation_config")
        asked = self.model.has_active_enabled_adapter and self.config.router == "discriminant" and forced is None
        # An encoder reads the prompt, and nothing else, in any case.
        if asked and prompt and not base.config.is_encoder_decoder and _reads_otherwise(base, settings, kwargs):
            if size > 1 and "input_ids" in prompt and "attention_mask" not in prompt:
                raise HfEsmError("generate: give attention_mask, too, so that the router sees which tokens are real.")
            with torch.no_grad():
                decided = route(self.model, vote(self.config, decide(self.model, prompt))[0])
        with decided:
            return self.model.generate(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "RoutedModel":
        self.model.to(*args, **kwargs)
        for task_model in self._task_models.values():
            task_model.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def route(self, tasks: str | Sequence[str] | Route) -> AbstractContextManager[None]:
        """Within `with model.route(…)`: a task for all samples, one per sample, `"static"` for none, or a `Route`.

        It holds for the thread that opens it: one that is started inside (a streamer's) has to open its own.
        """
        return route(self.model, tasks)

    def task_model(self, task: str) -> PreTrainedModel:
        """The task's model (`…ForSequenceClassification`, …) around the routed body, which all of them share.

        It is to run and to train, not to save (give a `Trainer` `save_strategy="no"`): `load_task_model` and
        `export_lora` give what can be saved, and this object's `save_pretrained` saves experts and heads that were
        trained.
        """
        if task not in self.tasks:
            raise HfEsmError(f"There is no expert for {task!r}; there are {', '.join(self.tasks)}.")
        if not (self.folder / HEADS_FOLDER / task / "config.json").is_file():
            raise HfEsmError(f"{self.folder}: no head of {task!r} in it. Merge again, or download the whole model.")
        if task not in self._task_models:
            found = attach_head(self.model.get_base_model(), self.folder, task)
            found.register_forward_pre_hook(partial(_refuse_ragged, task, self.model), with_kwargs=True)
            found.save_pretrained = partial(_refuse_saving, task)
            self._task_models[task] = found
        return self._task_models[task]

    @torch.no_grad()
    def explain(self, inputs: Any, batch_size: int = 32, **options: Any) -> list[Explanation]:
        """Which expert each input gets and why. Takes what `predict` takes."""
        inputs = _rows(inputs)
        self._need_router("explain")
        found: list[Optional[Explanation]] = [None] * len(inputs)
        prompts = self.model.get_base_model().can_generate()  # labels say where one ends
        for chosen, batch in self._batches(inputs, batch_size, options, with_targets=prompts):
            records = decide(self.model, batch)
            if not records:
                raise HfEsmError(f"explain: no router reads {', '.join(batch)}: there is no linear map on their way.")
            for row, i in enumerate(chosen):
                found[i] = explanation(self.config, records, row)
        return found

    @torch.no_grad()
    def predict(
        self,
        inputs: Any,
        tasks: Optional[str | Sequence[str]] = None,
        *,
        batch_size: int = 32,
        **options: Any,
    ) -> list[Prediction]:
        """Task and label of each input, by the head of the task that is given or that the router finds.

        Args:
            inputs: a list of texts, pairs, rows, images, or ready model inputs, as `calibration` of `merge_models`.
            tasks: the task of all inputs or of each, where it is known. Then its expert is added in all layers.
            options: fields of `SampleOptions`, such as `max_length`.
        """
        inputs = _rows(inputs)
        forced = routing_state(self.model).local.forced
        if tasks is None and isinstance(forced, Named):
            tasks = forced.names
            if "static" in ([tasks] if isinstance(tasks, str) else tasks):
                raise HfEsmError(
                    "predict: the route 'static' names no head. Give tasks=, whose experts are added, too."
                )
        given = [tasks] * len(inputs) if isinstance(tasks, str) else None if tasks is None else list(tasks)
        if unknown := [task for task in given or () if task not in self.tasks]:
            raise HfEsmError(f"There is no expert for {unknown[0]!r}; there are {', '.join(self.tasks)}.")
        if given is not None and len(given) != len(inputs):
            raise HfEsmError(f"{len(given)} tasks are given for {len(inputs)} inputs. Give one each.")
        if towers(whole := self.model.get_base_model()):
            raise HfEsmError(
                f"A {type(whole).__name__} compares its inputs, and has no class per sample: call the model itself. "
                "`explain` says which tasks its inputs are taken for."
            )
        if given is None:
            self._need_router("predict")
        found: list[Optional[Prediction]] = [None] * len(inputs)
        for chosen, batch in self._batches(inputs, batch_size, options):
            if given is not None:
                names, decision = [given[i] for i in chosen], None
            else:
                decision, names = vote(self.config, decide(self.model, batch))
            for task in dict.fromkeys(names):
                rows = [row for row, name in enumerate(names) if name == task]
                part = {name: value[rows] for name, value in batch.items()}
                if self.task_model(task).can_generate():
                    raise HfEsmError(f"{task!r} has no class per sample: it writes. Call `generate`.")
                forced = task if decision is None else take(decision, rows)
                with route(self.model, forced):
                    logits = getattr(self.task_model(task)(**part), "logits", None)
                if logits is None or logits.dim() != 2:
                    raise HfEsmError(f"{task!r} has no class per sample; run `task_model({task!r})` yourself.")
                config = self.task_model(task).config
                scores, labels = probabilities(logits.float(), config).max(-1), config.id2label
                for at, row in enumerate(rows):
                    sure = decision is None or is_sure(self.config, decision, row)
                    label = labels[int(scores.indices[at])]
                    found[chosen[row]] = Prediction(task, label, float(scores.values[at]), sure)
        return found

    def _need_router(self, what: str) -> None:
        if routing_state(self.model).local.forced is not None:
            raise HfEsmError(f"{what} asks the router, but a route is given. Call it outside of `route`.")
        if not self.model.has_active_enabled_adapter:
            raise HfEsmError(f"{what}: the experts are disabled, and the router with them. Enable the adapter.")
        if not self.config.decides:
            raise HfEsmError(f"{what}: this model has no router. Name the tasks: {', '.join(self.tasks)}.")

    def _batches(
        self, inputs: list[Any], batch_size: int, options: Mapping[str, Any], with_targets: bool = False
    ) -> Iterable[tuple[list[int], dict]]:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise HfEsmError(f"batch_size must be 1 or more, not {batch_size}.")
        if not inputs:
            return
        config = self.model.get_base_model().config
        settings = SampleOptions(**{"num_samples": 0, **options})
        samples = encode(inputs, self.processor, config, "inputs", settings, with_targets)
        order = sorted(range(len(samples)), key=lambda i: max(value.numel() for value in samples[i].values()))
        if "input_ids" in samples[0] and reads_singly(config):
            batch_size = 1
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        if not any("attention_mask" in sample or "input_ids" in sample for sample in samples):
            groups = batch_indices(samples, batch_size)  # pictures of one size, sound of one length
        for chosen in groups:
            yield chosen, batch_for([samples[i] for i in chosen], self.model.get_base_model())

    def save_pretrained(self, folder: str | os.PathLike, overwrite: bool = False) -> Path:
        """Write the whole model, experts and heads as they are now, to a folder that appears when it is whole.

        `overwrite` replaces what a merge wrote, and nothing else.
        """
        folder = Path(folder).expanduser()
        check_replaceable(folder, overwrite)
        with staging_folder(folder) as staging:
            shutil.copytree(self.folder, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            if trained := self._trained():
                for path, tensors in trained.items():
                    save_file(tensors, staging / path, {"format": "pt"})
                write_hashes(staging)
            publish_folder(staging, folder, overwrite)
        return folder

    def _trained(self) -> dict[str, dict[str, torch.Tensor]]:
        """By their file in the folder, the adapter's and the heads' tensors that are others than stand there."""
        held = {f"{ROUTED_FOLDER}/{SAFETENSORS_WEIGHTS_NAME}": get_peft_model_state_dict(self.model)}
        held |= {
            f"{HEADS_FOLDER}/{task}/{HEAD_WEIGHTS}": model.state_dict() for task, model in self._task_models.items()
        }
        found = {}
        for path, tensors in held.items():
            stored = load_file(self.folder / path) if (self.folder / path).is_file() else {}
            own = {name: tensors[name].cpu().contiguous() for name in stored}
            if any(not torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in own.items()):
                found[path] = own
        return found

    def _refuse_trained(self, what: str) -> None:
        if self._trained():
            raise HfEsmError(
                f"{what}: experts or heads were trained since they were loaded. Call save_pretrained, and {what} of "
                "what RoutedModel.from_pretrained loads from there."
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: Optional[str] = None,
        private: Optional[bool] = None,
        token: Optional[str | bool] = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the whole model; or, with `base_model`, the adapter alone over a static model that is on the Hub.

        Calibration samples stay here; their mean features, which the
        router is made from, do not. `kwargs` go to `HfApi.upload_folder` (`revision`, `commit_message`, …).
        """
        self._refuse_trained("push_to_hub")
        return push_folder(self.folder, repo_id, base_model=base_model, private=private, token=token, **kwargs)

    def export_lora(self, folder: str | os.PathLike, tasks: Optional[Iterable[str]] = None) -> dict[str, Path]:
        """Write every expert as an ordinary LoRA adapter over the static model, to `folder/TASK`.

        With one of them, the static model gives what this one gives in `with model.route(TASK)`.
        """
        self._refuse_trained("export_lora")
        experts = load_experts(self.folder)
        base = self.model.get_base_model()
        transposed = any(isinstance(base.get_submodule(m).get_base_layer(), Conv1D) for m in experts.factors)
        wanted = list(dict.fromkeys(self.tasks if tasks is None else tasks))
        if unknown := [task for task in wanted if task not in self.tasks]:
            raise HfEsmError(f"There is no expert for {unknown[0]!r}; there are {', '.join(self.tasks)}.")
        for task in wanted:
            new_folder(Path(folder) / task)
        return {
            task: write_lora_adapter(
                Path(folder).expanduser() / task,
                {
                    m: (a[experts.tasks.index(task)], b[experts.tasks.index(task)])
                    for m, (a, b) in experts.factors.items()
                },
                self._source.repo_id or str(self.folder.absolute()),
                base_revision=self._source.revision,
                fan_in_fan_out=transposed,
                base_class=type(base),
            )
            for task in wanted
        }

    def add_expert(
        self,
        task: str,
        expert: Any,
        statistics: Any = None,
        *,
        output_dir: str | os.PathLike,
        base: Any = None,
        token: Any = None,
    ) -> "RoutedModel":
        """One more task, from its expert, its statistics and the base; the static model stays as it is.

        Args:
            expert: as `merge_models` takes it; of the same architecture as the merged model.
            statistics: `ActivationStatistics`, or a path of such, collected with `base=`; by default what stands
                beside the expert's weights. Not needed by a model of method `tsv-c`.
            output_dir: folder to write the larger model to.
            base: what the expert was tuned from, by default the base that the recipe names; of a LoRA adapter, its
                own. Read where the experts' directions are of their updates (`expert_directions`).
        """
        self._refuse_trained("add_expert")
        static, trusted = self.model.get_base_model(), self._loading.get("trust_remote_code", False)
        folder = add_expert(
            self.folder, static, self.config, task, expert, statistics, Path(output_dir), token, trusted, base
        )
        return type(self).from_pretrained(folder, **self._loading)

    def remove_expert(self, task: str, *, output_dir: str | os.PathLike) -> "RoutedModel":
        """The model without one of its tasks, written to `output_dir`."""
        self._refuse_trained("remove_expert")
        static = self.model.get_base_model()
        folder = remove_expert(self.folder, static, self.config, task, Path(output_dir))
        return type(self).from_pretrained(folder, **self._loading)


def _reads_otherwise(model: PreTrainedModel, settings: Any, given: Mapping[str, Any]) -> bool:
    """Whether `generate`, given this, reads something else in its first pass than the prompt, or reads that again."""
    places = [given, *(vars(place) for place in (settings, model.generation_config, model.config) if place)]

    def asked(name: str) -> Any:
        return next((place[name] for place in places if place.get(name) is not None), None)

    return asked("use_cache") is False or any(asked(name) is not None for name in _OTHER_FIRST_PASS)


# Settings of `generate` by which its first pass does not read the whole prompt and nothing more.
_OTHER_FIRST_PASS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")


def _rows(inputs: Any) -> list[Any]:
    """Inputs as a list: of columns, such as a tokenizer's batch, the rows."""
    if isinstance(inputs, str):
        raise HfEsmError("Give a list of inputs, even for one: [text].")
    if not isinstance(inputs, (Mapping, Iterable)):
        raise HfEsmError(f"Give a list of inputs, not a {type(inputs).__name__}.")
    return read_rows(inputs, "inputs", SampleOptions(num_samples=0)) if isinstance(inputs, Mapping) else list(inputs)


def _refuse_ragged(task: str, model: PeftModel, head: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a task's model: one loss is of one head."""
    forced = routing_state(model).local.forced
    if kwargs.get("labels") is None or not isinstance(forced, Named) or isinstance(forced.names, str):
        return
    if others := sorted(set(forced.names) - {task, "static"}):
        raise HfEsmError(
            f"Samples of {others[0]!r} are routed through the head of {task!r}, and one loss is asked for. Run each "
            "task's samples through its own `task_model`."
        )


def _refuse_saving(task: str, *args: Any, **kwargs: Any) -> None:
    """In place of `save_pretrained` of a task's model, whose layers no `from_pretrained` would know."""
    raise HfEsmError(
        f"The model of {task!r} shares the routed body, and cannot be saved by itself. Save the static model with the "
        f"task's head (`load_task_model(folder, {task!r})`), the task's expert (`export_lora`), or all of it "
        "(`RoutedModel.save_pretrained`)."
    )
