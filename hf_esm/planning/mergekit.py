"""Recipes of mergekit, written as recipes of hf_esm: every key is converted, or named with the reason why not."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Optional

from ..errors import HfEsmError
from ..utils import check_known, check_task_name
from .mergekit_methods import METHODS, REFUSED, SIGNS
from .recipe import read_mapping


_KEYS = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "parameters",
)
# What mergekit's settings say that needs no setting of ours.
_WITHOUT_EFFECT = {"int8_mask": "int8_mask: saves memory in mergekit and changes no weight; hf_esm needs no mask"}


def is_mergekit(recipe: Mapping[str, Any]) -> bool:
    """Return whether a mapping from a YAML file is a recipe of mergekit."""
    return "merge_method" in recipe


def convert_mergekit(path: str | os.PathLike, base: Optional[str] = None) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe of mergekit (`arcee-ai/mergekit`) as one of hf_esm, and notes on what differs.

    The recipe merges every weight by the formula that mergekit uses, embeddings too, up to the dtype (hf_esm computes
    in float32) and, of `dare_*` and `della`, up to the random draw.

    Args:
        path: of the YAML file.
        base: checkpoint that all models were tuned from, where the file names none, or one of the models.

    Raises:
        HfEsmError: names the file and the first key that cannot be converted, and says why.
    """
    path = Path(path)
    config = read_mapping(path)
    if not is_mergekit(config):
        raise HfEsmError(f"{path} is not a recipe of mergekit: it has no `merge_method`.")
    return _Conversion(path, config, base).run()


class _Conversion:
    """One recipe on its way."""

    def __init__(self, path: Path, config: Mapping[str, Any], base: Optional[str]):
        self.path, self.config = path, config
        check_known(config, _KEYS, "key", f"{path}: mergekit's recipe")
        name = config["merge_method"]
        if name in REFUSED:
            self._refuse(f"merge_method {name}: {REFUSED[name]}")
        check_known([name], METHODS, "merge_method", str(path))
        self.method, self.kit_name = METHODS[name], name
        self.notes: list[str] = []
        self.overrides: list[dict[str, Any]] = []
        self.settings = dict(self.method.settings)
        self.globals = dict(self._mapping(config.get("parameters"), "parameters"))
        self.base = base if base is not None else config.get("base_model")
        self.models = self._read_models(base)

    def _refuse(self, reason: str) -> NoReturn:
        raise HfEsmError(f"{self.path}: {reason}.")

    def _mapping(self, value: Any, name: str) -> Mapping[str, Any]:
        if value is not None and not isinstance(value, Mapping):
            self._refuse(f"`{name}` must be a mapping, not {value!r}")
        return value or {}

    # Models.

    def _read_models(self, base: Optional[str]) -> dict[str, tuple[Any, dict[str, Any]]]:
        """Return by task the model as our recipes name it, and its parameters; the base is left out."""
        entries = self._entries()
        named_base = self.config.get("base_model")
        if self.base is None or (self.method.on_weights and base is None and self._is_one_of(named_base, entries)):
            given = f"`base_model` {named_base} is one of the models" if named_base else "there is no `base_model`"
            self._refuse(
                f"{given}. hf_esm merges fine-tunes of one checkpoint: name that, with --base MODEL (`base=`)"
            )
        models: dict[str, tuple[Any, dict[str, Any]]] = {}
        for entry in entries:
            check_known(entry, ("model", "parameters", "layer_range"), "key", f"{self.path}: `models`")
            model, parameters = self._model(entry.get("model")), self._mapping(entry.get("parameters"), "parameters")
            if model == self._model(self.base):
                if self.method.on_weights and parameters.get("weight"):
                    self._refuse("the base is one of the models, with a `weight`. Leave it out of `models`")
                continue
            models[self._task_of(model, models)] = (model, dict(parameters))
        if not models:
            self._refuse("`models` names no model besides the base")
        return models

    def _entries(self) -> list[Mapping[str, Any]]:
        """Return the models, from `models` or from the only slice, if that has one range of layers for all."""
        if self.config.get("modules"):
            self._refuse("`modules` assembles a model from parts of others, and hf_esm merges whole models")
        entries = self.config.get("models")
        if slices := self.config.get("slices"):
            if entries:
                self._refuse("`models` and `slices` are both there, of which mergekit takes one")
            sources = [s for part in slices for s in (part.get("sources") or [])]
            ranges = [tuple(source.get("layer_range") or ()) for source in sources]
            if len(slices) != 1 or len(set(ranges)) != 1 or ranges[0][:1] != (0,):
                self._refuse(
                    "`slices` takes layers from several models, or in another order, and hf_esm merges each layer "
                    "with the same layer of the others. Name whole models, under `models`"
                )
            self.notes.append(f"slices: layers {ranges[0][0]} to {ranges[0][1]} of every model are taken to be all")
            self.globals |= self._mapping(slices[0].get("parameters"), "parameters")
            entries = sources
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            self._refuse("`models` must be a list of mappings, as `- model: …`")
        return entries

    def _is_one_of(self, base: Any, entries: Iterable[Mapping[str, Any]]) -> bool:
        return any(self._model(entry.get("model")) == self._model(base) for entry in entries)

    def _model(self, model: Any) -> Any:
        """Return a model as our recipes name it; a LoRA adapter by its own path."""
        if isinstance(model, Mapping):
            check_known(model, ("model", "lora", "path", "revision"), "key", f"{self.path}: `model`")
            if model.get("lora"):
                return self._model(model["lora"])
            if "model" in model:
                return self._model(model["model"])
            path, revision = model.get("path"), model.get("revision")
            return f"{self._place(path)}@{revision}" if revision else self._place(path)
        if not isinstance(model, str) or not model:
            self._refuse(f"`model` must be a path or an id, not {model!r}")
        return self._place(model.partition("+")[2] or model)

    def _place(self, model: Any) -> Any:
        """Return the absolute path of a folder, which mergekit looks for from the current one; ids stay."""
        return str(Path(model).absolute()) if isinstance(model, str) and Path(model).is_dir() else model

    def _task_of(self, model: Any, taken: Mapping[str, Any]) -> str:
        stem = re.sub(r"[^\w.-]+", "-", Path(str(model)).name.partition("@")[0]) or "expert"
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 999))) if n not in taken and n != "base")
        check_task_name(name)
        return name

    # Parameters.

    def run(self) -> tuple[dict[str, Any], list[str]]:
        self._check_parameters()
        if self.kit_name == "slerp":
            self._convert_t()
        elif self.kit_name == "nuslerp":
            self._convert_nuslerp()
        alpha = self._convert_scales()
        by_match = self._convert_settings()
        weights = self._convert_weights() if "weight" in self._known() else {}
        name = "slerp" if self.kit_name == "nuslerp" and not self.config.get("base_model") else self.method.name
        scale = {} if self.method.on_weights else {"alpha": alpha}
        methods = [({"kind": "embedding"}, self.settings), *(({"match": match}, s) for match, s in by_match)]
        recipe: dict[str, Any] = {
            "base": self._model(self.base),
            "experts": {task: model for task, (model, _) in self.models.items()},
            "method": _described(name, self.settings),
            **scale,
            **({"weights": weights} if weights else {}),
            # Without its own method, an embedding is merged by token counts, and not by a method's α.
            "overrides": [{**which, "method": _described(name, s), **scale} for which, s in methods] + self.overrides,
            **self._convert_tokens(),
        }
        if dtype := self.config.get("out_dtype") or self.config.get("dtype"):
            recipe["dtype"] = dtype
        numbers = [number for o in self.overrides for number in (o.get("alpha"), *o.get("weights", {}).values())]
        if any(isinstance(number, list) for number in numbers):
            self.notes.append(
                "lists of numbers: weights behind the last block (the last norm, an output map of its own) get the "
                "last number; in mergekit, the first"
            )
        self.notes.append("every weight is computed in float32, whatever `dtype` is")
        return recipe, self.notes

    def _known(self) -> set[str]:
        """Return the parameters that mean something to the method."""
        known = {*self.method.parameters, *_WITHOUT_EFFECT}
        if self.method.normalize is not None:
            known |= {"weight", "normalize"}
            known |= {"rescale", "lambda"} if self.kit_name != "linear" else set()
        return known | ({"weight", "nuslerp_row_wise", "nuslerp_flatten"} if self.kit_name == "nuslerp" else set())

    def _check_parameters(self) -> None:
        """Refuse parameters that mean nothing to the method, or that hf_esm has no place for."""
        known = self._known()
        for task, parameters in {"": self.globals, **{t: p for t, (_, p) in self.models.items()}}.items():
            where = f"`parameters` of '{task}'" if task else "`parameters`"
            for name in parameters:
                if name == "filter_wise" and not parameters[name]:
                    continue
                if name not in known:
                    self._refuse(f"{where}: hf_esm has nothing for {name!r} of {self.kit_name}")
                if name in _WITHOUT_EFFECT and _WITHOUT_EFFECT[name] not in self.notes:
                    self.notes.append(_WITHOUT_EFFECT[name])
        rescales = self.kit_name in ("dare_linear", "dare_ties", "della")
        if bool(self.globals.get("rescale", rescales)) != rescales:
            does = "scales what is left up" if rescales else "leaves it as it is"
            self._refuse(f"`rescale` {self.globals['rescale']}: hf_esm's {self.method.name!r} always {does}")
        if self.kit_name.startswith(("dare", "della")):
            self.notes.append("random entries are drawn from another seed, and scaled by the share that is kept")

    def _of_all(self, name: str) -> Any:
        """Return a parameter that all models share; None if it is not there."""
        values = [parameters.get(name, self.globals.get(name)) for _, parameters in self.models.values()]
        if any(value != values[0] for value in values):
            self._refuse(f"`{name}` differs between the models, and hf_esm has one for all")
        return values[0]

    def _conditions(self, value: Any, name: str) -> tuple[Any, list[tuple[str, Any]]]:
        """Return the value of all weights, and those of weights whose name contains a text, the first match last."""
        if isinstance(value, Mapping):
            value = [value]
        if not (isinstance(value, list) and any(isinstance(part, Mapping) for part in value)):
            return self._number(value, name), []
        general, special = None, []
        for part in value:
            check_known(part, ("filter", "value"), "key", f"{self.path}: `{name}`")
            if part.get("filter") in (None, "*"):
                general = self._number(part.get("value"), name)
                break
            special.append((re.escape(part["filter"]), self._number(part.get("value"), name)))
        return general, special[::-1]

    def _number(self, value: Any, name: str) -> Any:
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
            self._refuse(f"`{name}` must be a number, or a list of numbers, not {value!r}")
        return value

    def _convert_settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Take density, gamma, epsilon, … over; return the settings of weights by a pattern, the last match wins."""
        by_match: list[tuple[str, dict[str, Any]]] = []
        for name, ours in self.method.parameters.items():
            if name == "t":
                continue
            general, special = self._conditions(self._of_all(name), name)
            if any(isinstance(number, list) for number in (general, *(number for _, number in special))):
                self._refuse(f"`{name}`: hf_esm has no gradient of it. Give a number")
            factor = 2 if name == "epsilon" else 1  # ours is the whole width
            if special and by_match:
                self._refuse(f"`{name}` and another setting have filters, of which hf_esm takes one setting's")
            by_match += [(match, {ours: factor * number}) for match, number in special]
            if general is not None:
                self.settings[ours] = factor * general
        return [(match, {**self.settings, **settings}) for match, settings in by_match]

    def _convert_scales(self) -> float:
        """Take `lambda` and `normalize` over: into α, or into the method's own setting."""
        general, special = self._conditions(self.globals.get("lambda", 1.0), "lambda")
        general = 1.0 if general is None else general
        divisor = 1.0
        normalize = self.globals.get("normalize", self.method.normalize)
        if self.method.signs:
            self.settings["normalize"] = SIGNS[bool(normalize)]
        elif self.method.normalize is not None and bool(normalize) != (self.method.name == "mean"):
            divisor = self._sum_of_weights(bool(normalize))
        points = [(".", general)] if isinstance(general, list) else []
        for match, number in [*points, *special]:
            self.overrides.append({"match": match, "alpha": _scaled(number, 1 / divisor)})
        return 1.0 if points else general / divisor

    def _sum_of_weights(self, normalize: bool) -> float:
        """Return what the sum of the weighted updates is divided by."""
        weights = [parameters.get("weight", self.globals.get("weight")) for _, parameters in self.models.values()]
        if not all(isinstance(weight, (int, float)) for weight in weights):
            self._refuse("`normalize` with a `weight` that is not one number cannot be written as an alpha")
        total = float(sum(weights))
        if not normalize and abs(total - 1) > 1e-6:  # the mean of whole weights
            self._refuse(f"`normalize: false` with weights that sum to {total:g} scales the base's weights, too")
        return total if normalize else 1.0

    def _convert_weights(self) -> dict[str, float]:
        """Return the weights of the tasks; those of some weights alone, and gradients, become overrides."""
        weights: dict[str, float] = {}
        for task, (_, parameters) in self.models.items():
            general, special = self._conditions(parameters.get("weight", self.globals.get("weight")), "weight")
            if general is None:
                self._refuse(f"the model of '{task}' has no `weight`, or none for all weights that no filter matches")
            if isinstance(general, list):
                self.overrides.append({"match": ".", "weights": {task: general}})
            elif general != 1:
                weights[task] = float(general)
            self.overrides += [{"match": match, "weights": {task: number}} for match, number in special]
        return weights

    def _convert_t(self) -> None:
        """Write the point between the two models as their weights, with t = 1/2."""
        if len(self.models) != 2:
            self._refuse(f"slerp takes two models, and there are {len(self.models)} besides the base")
        general, special = self._conditions(self._of_all("t"), "t")
        if general is None:
            self._refuse("`t` is missing, or has no value for all weights that no filter matches")
        tasks = list(self.models)
        if self._start() == self.models[tasks[1]][0]:
            tasks.reverse()  # mergekit starts at its base_model
        first, second = tasks
        if not special and not isinstance(general, list) and first == next(iter(self.models)):
            self.settings["t"] = general
            return
        points = [(".", general), *special]
        self.overrides += [{"match": match, "weights": _between(first, second, t)} for match, t in points]

    def _start(self) -> Any:
        """Return the model that mergekit's slerp starts from."""
        named = self.config.get("base_model")
        return self._model(named) if named else None

    def _convert_nuslerp(self) -> None:
        if not self.globals.get("nuslerp_flatten", True):
            self.settings["along"] = "columns" if self.globals.get("nuslerp_row_wise") else "rows"
        if not self.config.get("base_model") and self.settings:
            self._refuse("`nuslerp_flatten: false` without a `base_model`: hf_esm has it for updates alone")

    # Tokens.

    def _convert_tokens(self) -> dict[str, Any]:
        source, settings = self.config.get("tokenizer_source"), self.config.get("tokenizer")
        converted: dict[str, Any] = {}
        if source is not None:
            converted["tokenizer"] = self._token_model(source)
        if settings is not None:
            known = ("source", "tokens", "pad_to_multiple_of")
            check_known(self._mapping(settings, "tokenizer"), known, "key", f"{self.path}: `tokenizer`")
            converted["tokenizer"] = {
                **settings,
                **({"source": self._token_model(settings["source"])} if "source" in settings else {}),
                **({"tokens": self._tokens(settings["tokens"])} if "tokens" in settings else {}),
            }
        template = self.config.get("chat_template")
        if template not in (None, "auto"):
            self._refuse(
                f"`chat_template` {str(template)[:40]!r}: hf_esm takes the template of one of the models. Leave it "
                "out, and name the task, or `base`, as `chat_template` in the recipe"
            )
        if template == "auto":
            self.notes.append("chat_template: auto is left out; where templates differ, the merge asks for one")
        return converted

    def _tokens(self, tokens: Any) -> dict[str, Any]:
        return {
            token: {**entry, "source": self._token_model(entry["source"])} if "source" in entry else dict(entry)
            for token, entry in self._mapping(tokens, "tokens").items()
        }

    def _token_model(self, source: Any) -> Any:
        """Return a source of tokens with tasks in the place of models."""
        if source in ("union", "base"):
            return source
        if isinstance(source, Mapping) and "kind" in source:
            return {k: self._token_model(value) if k == "model" else value for k, value in source.items()}
        model = self._model(source)
        if model == self._model(self.base):
            return "base"
        task = next((task for task, (known, _) in self.models.items() if known == model), None)
        if task is None:
            self._refuse(f"the source of tokens {source!r} is none of the models")
        return task


def _described(name: str, settings: Mapping[str, Any]) -> Any:
    return {"name": name, **settings} if settings else name


def _scaled(value: Any, factor: float) -> Any:
    return [number * factor for number in value] if isinstance(value, list) else value * factor


def _between(first: str, second: str, t: Any) -> dict[str, Any]:
    """Return the weights of two tasks at a point between them."""
    return {first: [1 - n for n in t] if isinstance(t, list) else 1 - t, second: t}
