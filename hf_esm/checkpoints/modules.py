"""The modules of a Sentence Transformers model: read from its folder, compared, and written beside a merged body."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForTextEncoding, PretrainedConfig, PreTrainedModel

from ..architecture import SENTENCE_MODULES
from ..data import Prompt
from ..errors import DamagedFileError, HfEsmError
from ..utils import is_file, read_tensors, reading
from .layout import CONFIG_FILE, MODULES_FILE, PICKLED_WEIGHTS, SENTENCE_SETTINGS, TRANSFORMER_SETTINGS, WEIGHTS_FILE
from .pooling import EMBEDDING, KINDS, SentenceHead, activation_of, names_of, pooling_modes


@dataclass(frozen=True)
class SentenceModules:
    """What a Sentence Transformers model has besides its Transformer.

    Attributes:
        folder: the model's folder.
        entries: what `modules.json` lists, the Transformer first.
        configs: config of every other module, by the name of its folder.
        transformer: settings of the Transformer module.
        settings: what `config_sentence_transformers.json` holds: prompts, name of the similarity.
        tensors: weights of dense modules and norms, by their name in a live model.
        scratch: what keeps the folder, if it is that of a live model.
    """

    folder: Path
    entries: tuple[dict[str, Any], ...]
    configs: dict[str, dict[str, Any]]
    transformer: dict[str, Any]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    scratch: Any = None

    @property
    def embeds(self) -> bool:
        """Whether the first module is a body without a head of its own."""
        task = self.transformer.get("transformer_task", "feature-extraction")
        return _kind(self.entries[0]) == "Transformer" and task == "feature-extraction"

    @property
    def prompt(self) -> Prompt:
        """The prompt that `SentenceTransformer.encode` puts before texts by default."""
        return _prompt_of(self.settings, [config for _, kind, config in self._parts() if kind == "Pooling"])

    def encoder_class(self, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """Return the class that the library loads the Transformer as; `model_class` is the one that its config
        names.
        """
        encoders = (AutoModelForTextEncoding, AutoModel) if config.is_encoder_decoder else (AutoModel,)
        mappings = [auto._model_mapping for auto in encoders if type(config) in auto._model_mapping]
        known = [mapping[type(config)] for mapping in mappings]
        return model_class if not self.embeds or not known or model_class in known[:1] else known[0]

    def head(self) -> SentenceHead:
        """Build the modules as parts of a live model, with the values of `tensors`."""
        text = (self.transformer.get("modality_config") or {}).get("text") or {}
        output = text.get("method_output_name", "last_hidden_state")
        feature = self.transformer.get("module_output_name") or "token_embeddings"
        complete = self.embeds and text.get("method", "forward") == "forward" and isinstance(output, str)
        modules = {}
        for name, kind, config in self._parts():
            if kind == "Dense" and activation_of(config) is None:
                complete, config = False, {**config, "activation_function": "torch.nn.Identity"}
            if kind in KINDS:
                with torch.device("meta"):
                    modules[name] = KINDS[kind](config)
            complete &= kind in KINDS
        head = SentenceHead(modules, output if complete else "", feature, complete, self.prompt)
        tensors = {name.removeprefix(f"{SENTENCE_MODULES}."): tensor for name, tensor in self.tensors.items()}
        head.load_state_dict(tensors, assign=True)
        return head.requires_grad_(False).eval()

    def _parts(self) -> Iterable[tuple[str, str, dict[str, Any]]]:
        """Yield name, kind and config of every module after the Transformer, without those that do nothing."""
        for entry in self.entries[1:]:
            if _kind(entry) != "Dropout":
                yield _name(entry), _kind(entry), self.configs[_name(entry)]

    def describe(self) -> str:
        """Say how embeddings are made, in words that are equal for models that make them alike."""
        return " → ".join(self._describe(*part) for part in self._parts()) or "no module after the Transformer"

    def _describe(self, name: str, kind: str, config: Mapping[str, Any]) -> str:
        if kind == "Pooling":
            prompts = "" if config.get("include_prompt", True) else " without prompts"
            return f"pooling by {' and '.join(pooling_modes(config))}{prompts}"
        if kind == "Dense":
            activation = config.get("activation_function", "Tanh").rpartition(".")[2]
            notes = [activation, *(["no bias"] if not config.get("bias", True) else [])]
            notes += ["residual"] if config.get("use_residual") else []
            notes += _unusual_names(config)
            return f"a dense layer {config['in_features']} × {config['out_features']} ({', '.join(notes)})"
        if kind in ("LayerNorm", "Normalize"):
            return {"LayerNorm": "a norm", "Normalize": "normalisation"}[kind] + "".join(_unusual_names(config))
        return f"{kind} {_hash_of(self.folder / self._path(name))}"

    def _path(self, name: str) -> str:
        return next(entry["path"] for entry in self.entries if _name(entry) == name)

    def save(self, folder: Path, weight: Callable[[str], Tensor]) -> None:
        """Write the modules into the folder of a merged model.

        Args:
            weight: returns the merged weights, by the names in `tensors`.
        """
        entries = [{**self.entries[0], "path": ""}, *self.entries[1:]]
        for entry in entries[1:]:
            source, target = self.folder / entry["path"], folder / entry["path"]
            prefix = f"{SENTENCE_MODULES}.{_name(entry)}."
            tensors = {n.removeprefix(prefix): weight(n) for n in self.tensors if n.startswith(prefix)}
            weights = (WEIGHTS_FILE, PICKLED_WEIGHTS) if tensors else ()
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*weights))
            target.mkdir(parents=True, exist_ok=True)
            if tensors:
                save_file({n: t.contiguous() for n, t in tensors.items()}, target / WEIGHTS_FILE, {"format": "pt"})
        for entry in entries:  # code that comes with the model
            code = f"{entry['type'].partition('.')[0]}.py"
            if (self.folder / code).is_file():
                shutil.copy(self.folder / code, folder)
        _write_json(folder / MODULES_FILE, entries)
        _write_json(folder / SENTENCE_SETTINGS, self.settings)
        if self.transformer:
            _write_json(folder / TRANSFORMER_SETTINGS[0], self.transformer)

    def mean_with(self, others: Sequence["SentenceModules"]) -> "SentenceModules":
        """Return these modules with the mean of the weights of all."""
        every = [self, *others]
        tensors = {
            name: torch.stack([modules.tensors[name].double() for modules in every]).mean(0).to(tensor.dtype)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)


def transformer_path(folder: Path) -> str:
    """Return where the Transformer is in the folder of a Sentence Transformers model: a subfolder in older models,
    nothing where it is the folder itself, as in any other model.

    Raises:
        HfEsmError: if `modules.json` is damaged, or names a place outside of the folder.
    """
    entries = _entries(folder)
    return entries[0]["path"] if entries else ""


def transformer_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the Transformer module in a folder; empty if there are none."""
    return next(filter(None, (_read_settings(folder / name) for name in TRANSFORMER_SETTINGS)), {})


def prompt_in(folder: Path) -> Prompt:
    """Return the prompt that a model in a folder reads before texts by default."""
    pooling = [entry["path"] for entry in _entries(folder) if _kind(entry) == "Pooling"]
    configs = [_read_settings(folder / path / CONFIG_FILE) for path in pooling]
    return _prompt_of(_sentence_settings(folder), configs)


def _prompt_of(settings: Mapping[str, Any], poolings: Iterable[Mapping[str, Any]]) -> Prompt:
    return Prompt(_default_prompt(settings), all(config.get("include_prompt", True) for config in poolings))


def module_paths(folder: Path) -> list[str]:
    """Return the subfolders of all modules but the Transformer."""
    return [entry["path"] for entry in _entries(folder)[1:] if entry["path"]]


def read_modules(folder: Path, title: str, allow_pickle: bool = False) -> Optional[SentenceModules]:
    """Read the modules in a model's folder; None if it makes no embeddings by Sentence Transformers.

    Raises:
        HfEsmError: if they cannot be read, or do not begin with a model of Transformers.
    """
    entries = _entries(folder)
    if not entries:
        return None
    place = folder / entries[0]["path"]
    transformer = transformer_settings(place)
    if len(entries) == 1 and "classification" in str(transformer.get("transformer_task")):  # a cross-encoder
        return None
    configs = {_name(entry): _read_settings(folder / entry["path"] / CONFIG_FILE) for entry in entries[1:]}
    tensors: dict[str, Tensor] = {}
    for entry in entries[1:]:
        if _kind(entry) in ("Dense", "LayerNorm"):
            stored = _read_weights(folder / entry["path"], title, allow_pickle)
            tensors |= {f"{SENTENCE_MODULES}.{_name(entry)}.{name}": tensor for name, tensor in stored.items()}
    settings = _sentence_settings(folder)
    modules = SentenceModules(folder, tuple(entries), configs, transformer, settings, tensors)
    try:
        modules.head()
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise HfEsmError(
            f"{title}: its modules cannot be read: {' '.join(str(error).split())}. Save it again with Sentence "
            "Transformers."
        ) from None
    return modules


def common_settings(
    base: Optional[SentenceModules], experts: Mapping[str, SentenceModules]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a merged model, those of the base first, and warnings of prompts that are left out.

    What the base does not say, or says as an empty prompt, is the experts' if those that say it agree.
    """
    settings, warnings = dict(base.settings) if base else {}, []
    prompts = dict(settings.get("prompts") or {})
    of_experts = {task: modules.settings.get("prompts") or {} for task, modules in experts.items()}
    for name in dict.fromkeys(name for found in of_experts.values() for name in found):
        texts = {task: found[name] for task, found in of_experts.items() if found.get(name)}
        if not prompts.get(name) and len(set(texts.values())) == 1:
            prompts[name] = next(iter(texts.values()))
        elif others := [task for task, text in texts.items() if text != prompts.get(name)]:
            kept = repr(prompts[name]) if prompts.get(name) else "none"
            warnings.append(
                f"'{others[0]}': its prompt {name!r} is {texts[others[0]]!r}, which differs from other models'. The "
                f"merged model has {kept}."
            )
        else:
            prompts.setdefault(name, "")
    for key in dict.fromkeys(key for modules in experts.values() for key in modules.settings):
        found = (modules.settings.get(key) for modules in experts.values())
        values = [value for value in found if value is not None]
        if settings.get(key) is None and values and all(value == values[0] for value in values):
            settings[key] = values[0]
    if settings.get("default_prompt_name") not in prompts:  # the library would not load it
        settings["default_prompt_name"] = None
    settings["prompts"] = prompts
    for task, modules in experts.items():
        own, merged = _default_prompt(modules.settings), _default_prompt(settings)
        if own != merged:
            warnings.append(
                f"'{task}': it reads texts after the prompt {own!r}, the merged model by default after {merged!r}. "
                f"Its samples are read with its own, as the merged model reads texts by `encode(…, prompt={own!r})`."
            )
    return settings, warnings


def _default_prompt(settings: Mapping[str, Any]) -> str:
    """Return the prompt that is put before texts by default; empty if there is none."""
    return (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or ""


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Return what `modules.json` lists; nothing without the file."""
    path = folder / MODULES_FILE
    entries = _read_json(path)
    if entries is None:
        return []
    whole = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    fields = [(entry.get("path"), entry.get("type")) for entry in entries] if whole else []
    if not fields or not all(isinstance(part, str) for field in fields for part in field):
        raise DamagedFileError(f"{path} is damaged. Copy or download it again.")
    if outside := [part for part, _ in fields if Path(part).is_absolute() or ".." in Path(part).parts]:
        raise HfEsmError(f"{path} names {outside[0]!r}, which is not in the model's folder. Do not use this model.")
    return entries


def _name(entry: Mapping[str, Any]) -> str:
    """Return the name of a module inside a live model."""
    return entry["path"].replace(".", "_").replace("/", "_") or entry.get("name", "")


def _kind(entry: Mapping[str, Any]) -> str:
    return entry["type"].rpartition(".")[2]


def _unusual_names(config: Mapping[str, Any]) -> list[str]:
    reads, writes = names_of(config)
    return [f" {reads} to {writes}"] if (reads, writes) != (EMBEDDING, EMBEDDING) else []


def _hash_of(folder: Path) -> str:
    """Return a short hash of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:8]


def _read_json(path: Path) -> Any:
    if not is_file(path):
        return None
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _read_settings(path: Path) -> dict[str, Any]:
    """Return what a file of settings holds; nothing without the file."""
    settings = _read_json(path)
    if settings is not None and not isinstance(settings, dict):
        raise DamagedFileError(f"{path} is damaged: it holds no settings by name. Copy or download it again.")
    return settings or {}


def _sentence_settings(folder: Path) -> dict[str, Any]:
    path = folder / SENTENCE_SETTINGS
    settings = _read_settings(path)
    with reading(path):
        if not isinstance(_default_prompt(settings), str):
            raise ValueError("its default prompt is not a text")
    return settings


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_weights(folder: Path, title: str, allow_pickle: bool) -> dict[str, Tensor]:
    """Read the weights of one module."""
    if (folder / WEIGHTS_FILE).is_file():
        return read_tensors(folder / WEIGHTS_FILE)
    if (folder / PICKLED_WEIGHTS).is_file() and allow_pickle:
        with reading(folder / PICKLED_WEIGHTS):
            return torch.load(folder / PICKLED_WEIGHTS, map_location="cpu", weights_only=True)
    remedy = "Pass `allow_pickle=True` if you trust it." if (folder / PICKLED_WEIGHTS).is_file() else "Save it again."
    raise HfEsmError(f"{title}: no {WEIGHTS_FILE} in {folder}. {remedy}")
