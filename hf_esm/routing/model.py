"""`RoutedModel`: a merged model with its experts, router, heads and processor, from a folder or the Hub."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..calibration import ActivationStatistics
from ..checkpoints import (
    ROUTED_FOLDER,
    Access,
    ModelSource,
    ModelSpec,
    buildable,
    load_processor,
    quiet_peft,
    resolve_class,
    resolve_source,
    whole_folder,
)
from ..data import DataSpec, RunOptions
from ..errors import HfEsmError
from ..hub import push_folder, verify_routed
from ..tuners.routed import Route, route
from ..utils import check_known
from .adapters import check_present
from .as_module import AsModule
from .editing import ExpertSpec, add_expert, remove_expert
from .explanations import Explanation, Prediction
from .export import export_experts
from .prediction import explain, predict
from .prompts import prompt_route, request
from .saving import check_settings, check_static, save_model, trained_tensors
from .sentences import sentence_transformer
from .task_models import build_task_model, follow


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class RoutedModel(AsModule):
    """A merged model that adds to each sample the experts of its likeliest tasks (ESM++, arXiv 2606.19164).

    Attributes:
        model: the `PeftModel`. Call it, or this object, as any Transformers model.
        folder: the folder that the model was loaded from.
        processor: tokenizer or processor; None if the folder has none.
        adapter: name of the routed adapter in the `PeftModel`.
        config: configuration of the routed adapter.
        tasks: names of the experts.

    Example:
        >>> from hf_esm import RoutedModel
        >>> model = RoutedModel.from_pretrained("routed")
        >>> predictions = model.predict(sst2_texts)  # the router decides on the task of each text
        >>> model.predict(sst2_texts[:1], tasks="sst2")[0].task
        'sst2'
        >>> inputs = model.processor(sst2_texts, padding=True, return_tensors="pt")
        >>> with model.route("sst2"):  # the task is known: its expert is added in all layers
        ...     logits = model.task_model("sst2")(**inputs).logits
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
        self.adapter: str = model.active_adapter
        self.config = model.peft_config[self.adapter]
        self.tasks: list[str] = self.config.tasks
        self._task_models: dict[str, PreTrainedModel] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
        revision: Optional[str] = None,
        token: Optional[str | bool] = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "RoutedModel":
        """Load the output of `merge_models(…, method="esm++")` (or `"tsv-c"`), from a folder or the Hub.

        Args:
            model: folder or Hub id.
            revision: branch, tag or commit.
            token: access token for the Hub.
            allow_pickle: whether a static model in `.bin` files, which can run code when they are read, may be read.
            trust_remote_code: whether code in the model's repository may run.
            kwargs: passed to the static model's `from_pretrained`: `dtype`, `device_map`, `quantization_config`, …

        Raises:
            HfEsmError: if the model has no routed experts, or a file differs from its recorded hash or has none.
        """
        folder = whole_folder(model, str(model), revision, token)
        repo_id = None if Path(model).expanduser().is_dir() else str(model).partition("@")[0]
        verify_routed(folder, str(model), allow_pickle)
        source = resolve_source(str(folder), str(model), Access(trust_remote_code=trust_remote_code))
        config, model_class = resolve_class(source)
        with buildable(str(model)), quiet_peft():
            static = model_class.from_pretrained(folder, config=config, **kwargs)
            # PEFT would take off the hooks that Accelerate offloads weights by.
            places = vars(static).pop("hf_device_map", None)
            adapted = PeftModel.from_pretrained(static, str(folder / ROUTED_FOLDER)).eval()
        if places is not None:
            static.hf_device_map = places
        source.repo_id, source.revision = repo_id, folder.name if repo_id else None
        loading = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code, **kwargs}
        return cls(adapted, folder, load_processor(folder, trust_remote_code), source, loading)

    def __repr__(self) -> str:
        static = type(self.model.base_model.model).__name__
        return (
            f"RoutedModel({str(self.folder)!r}: {static} with experts of {', '.join(self.tasks)}; "
            f"router: {self.config.router}; {self.dtype}, {self.device})"
        )

    def __call__(
        self,
        *args: Any,
        tasks: Optional[str | Sequence[str]] = None,
        prompt_length: Optional[int | Sequence[int]] = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model as any Transformers model.

        Args:
            args, kwargs: inputs of the model.
            tasks: the task of all samples, or of each, as for `route`.
            prompt_length: number of tokens of all prompts, or of each, padding not counted. The router reads these
                alone, where prompt and answer are run together without labels.
        """
        with request(self, tasks, prompt_length):
            return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        tasks: Optional[str | Sequence[str]] = None,
        prompt_length: Optional[int | Sequence[int]] = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the static model does; the prompt decides the route.

        With assisted decoding, prompt lookup or prefilling in chunks, the first pass does not read exactly the prompt;
        without a cache, every pass reads more. Then the router reads the prompt in a separate pass before.

        Args:
            args, kwargs: arguments of Transformers' `generate`.
            tasks: the task of all prompts, or of each, as for `route`.
            prompt_length: number of tokens that the router reads of all prompts, or of each; by default all.
        """
        with request(self, tasks, prompt_length), prompt_route(self, args, kwargs):
            return self.model.generate(*args, **kwargs)

    def predict(
        self,
        inputs: Iterable[Any] | Mapping[str, Any],
        tasks: Optional[str | Sequence[str]] = None,
        *,
        batch_size: int = 32,
        prompt_length: Optional[int] = None,
        probabilities: bool = False,
        **options: Any,
    ) -> list[Prediction]:
        """Predict the task and the label of each input.

        The label comes from the head of the task that `tasks` names, or that the router decides on.

        Args:
            inputs: texts, pairs, rows, images or ready model inputs, as for `calibration` of `merge_models`; or a
                mapping of columns, such as a tokenizer's batch.
            tasks: the task of all inputs, or of each. Its expert is added in all layers.
            batch_size: maximal number of inputs in a forward pass.
            prompt_length: number of tokens of each input that the router reads; by default all.
            probabilities: return the probabilities of all labels, too.
            options: fields of `SampleOptions`, such as `max_length`.

        Returns:
            One prediction for each input, in their order.

        Raises:
            HfEsmError: if a task is unknown, or its head does not give one class per sample.
        """
        with request(self, None, prompt_length):
            return predict(self, inputs, tasks, batch_size, options, probabilities)

    def explain(
        self, inputs: Iterable[Any] | Mapping[str, Any], batch_size: int = 32, **options: Any
    ) -> list[Explanation]:
        """Explain which experts each input gets, and why.

        Args:
            inputs, batch_size, options: as for `predict`.

        Raises:
            HfEsmError: if the model has no router, or a route is given.
        """
        return explain(self, inputs, batch_size, options)

    def route(self, tasks: str | Sequence[str] | Route) -> AbstractContextManager[None]:
        """Within `with model.route(…)`, samples get the named experts instead of those that the router chooses.

        The route belongs to the request: it holds in this thread and asyncio task, and in those that asyncio starts
        inside. A thread that is started by hand, such as that of a streamer, has none: pass `tasks` there.

        Args:
            tasks: one task for all samples, one task per sample, `"static"` for no expert, or a `Route`.

        Raises:
            HfEsmError: if there is no such task.
        """
        return route(check_present(self), tasks)

    def task_model(self, task: str) -> PreTrainedModel:
        """The model of a task (`…ForSequenceClassification`, …) around the routed body, which all tasks share.

        This model can be run and trained. A `Trainer` saves and resumes what it trains: experts and head, as
        `model.safetensors` in its folders, which `load_state_dict(…, strict=False)` of this model reads.
        `save_pretrained` of this object saves the whole model. `load_task_model` and `export_lora` give models that
        are saved by themselves.

        Raises:
            HfEsmError: if there is no such task, or the folder has no head for it.
        """
        check_known([task], self.tasks, "expert for")
        if task not in self._task_models:
            self._task_models[task] = build_task_model(check_present(self), self.folder, task)
        return follow(check_present(self), self._task_models[task])

    def sentence_transformer(self, **kwargs: Any) -> "SentenceTransformer":
        """The routed model as a `SentenceTransformer`, of experts that are models of Sentence Transformers.

        Each text gets the experts that the router chooses, or those that `with model.route(…)` names. To save it, save
        this object.

        Args:
            kwargs: passed to `SentenceTransformer`.

        Raises:
            HfEsmError: if the library is missing, or the model's folder holds no pooling.
        """
        return sentence_transformer(self, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike, overwrite: bool = False) -> Path:
        """Write the whole model to a folder: experts, heads, tokenizer and settings of generation as they are now.

        Args:
            folder: appears when it is complete.
            overwrite: whether a folder that a merge wrote may be replaced.

        Raises:
            HfEsmError: if the folder exists, and is not to be replaced; if weights of the static model were changed;
                if there are adapters of another kind, such as a LoRA, which would be lost.
        """
        folder, trained = Path(folder).expanduser(), self._trained()
        save_model(self._source, self.folder, self.model.get_base_model(), self.processor, trained, folder, overwrite)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: Optional[str] = None,
        private: Optional[bool] = None,
        token: Optional[str | bool] = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the whole model, or its routed adapter alone.

        Calibration samples are not uploaded. Their mean features, from which the router is made, are.

        Args:
            repo_id: repository on the Hub, which is created if it does not exist.
            base_model: Hub id of the static model; then the adapter alone is uploaded.
            private: whether the repository is to be private.
            token: access token for the Hub.
            kwargs: passed to `HfApi.upload_folder`: `revision`, `commit_message`, …

        Raises:
            HfEsmError: see `push_folder`.
        """
        self._refuse_trained("push_to_hub")
        static = self.model.get_base_model()
        check_static(self._source, static)
        check_settings(self.folder, static, self.processor)
        return push_folder(self.folder, repo_id, base_model=base_model, private=private, token=token, **kwargs)

    def export_lora(
        self,
        folder: str | os.PathLike,
        tasks: Optional[Iterable[str]] = None,
        *,
        heads: bool = True,
        base_model: Optional[str] = None,
    ) -> dict[str, Path]:
        """Write every expert as an ordinary LoRA adapter over the static model, to `folder/TASK`.

        An adapter belongs to the class of its task, and brings head and tokenizer along: over the static model, loaded
        as that class with the task's number of labels, it gives what `task_model(TASK)` gives in `with
        model.route(TASK)`.

        Args:
            folder: gets a folder for each task.
            tasks: tasks to export; by default all.
            heads: False for adapters that belong to the class of the static model, and bring no head.
            base_model: Hub id of the static model, which the adapters name as their base; by default the place that
                this model was loaded from.

        Returns the folder of each adapter, by task.

        Raises:
            HfEsmError: if a task is unknown, a folder exists, or a head is not made of whole modules.
        """
        self._refuse_trained("export_lora")
        tasks = self.tasks if tasks is None else list(tasks)
        check_known(tasks, self.tasks, "expert for")
        return export_experts(self, Path(folder).expanduser(), tasks, heads, base_model)

    def add_expert(
        self,
        task: str,
        expert: ModelSpec,
        statistics: Optional[ActivationStatistics | str | os.PathLike] = None,
        *,
        output_dir: str | os.PathLike,
        calibration: Optional[DataSpec] = None,
        base: Optional[ModelSpec] = None,
        token: Optional[str | bool] = None,
        **options: Any,
    ) -> "RoutedModel":
        """Add a task from its expert and its samples or statistics, in a new folder. The static model does not change.

        From samples, the router learns what the merged model reads on them. Statistics hold what the base reads on
        them, from which the router can only estimate that: a warning is logged if the task's samples may then be taken
        for those of another one.

        Args:
            task: name of the new task.
            expert: as for `merge_models`; of the same architecture as the merged model.
            statistics: `ActivationStatistics` or their path, collected with `base=`; by default those of the samples,
                or those in the expert's folder. A model of method `tsv-c` needs none.
            output_dir: folder for the larger model.
            calibration: unlabelled samples of the task, as for `calibrate`.
            base: the model that the expert was tuned from; by default the base in the recipe, or for a LoRA adapter
                its own base. Needed where the directions of experts are those of their updates (`expert_directions`).
            token: access token for the Hub.
            options: fields of `RunOptions` for the samples: `num_samples`, `max_length`, `columns`, `batch_size`, …

        Raises:
            HfEsmError: if the task exists, the expert or its statistics do not fit, or `output_dir` exists.
        """
        self._refuse_trained("add_expert")
        allowed = {name: self._loading.get(name, False) for name in ("allow_pickle", "trust_remote_code")}
        access = Access(token, **allowed)
        options = RunOptions(**{**allowed, **options})
        spec = ExpertSpec(task, expert, statistics, base, access, calibration, options)
        folder = add_expert(self.folder, self.model.get_base_model(), self.config, spec, Path(output_dir))
        return type(self).from_pretrained(folder, **self._loading)

    def remove_expert(self, task: str, *, output_dir: str | os.PathLike) -> "RoutedModel":
        """Write the model without one of its tasks to `output_dir`, and load it.

        Raises:
            HfEsmError: if there is no such task, it is the last one, or `output_dir` exists.
        """
        self._refuse_trained("remove_expert")
        folder = remove_expert(self.folder, self.model.get_base_model(), self.config, task, Path(output_dir))
        return type(self).from_pretrained(folder, **self._loading)

    def _trained(self) -> dict[str, dict[str, torch.Tensor]]:
        return trained_tensors(self.folder, check_present(self), self.adapter, self._task_models)

    def _refuse_trained(self, call: str) -> None:
        if self._trained():
            raise HfEsmError(
                f"{call}: experts or heads were trained since they were loaded. Call save_pretrained, load the saved "
                f"model with RoutedModel.from_pretrained, and call its {call}."
            )
