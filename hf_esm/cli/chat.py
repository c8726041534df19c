"""Talk to a merged model that writes: the quickest look at a result. Each line is answered; an empty line ends. A
routed model says before each answer which expert gives it, and how likely that task is.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Optional

from accelerate import PartialState
from transformers import PreTrainedModel, TextStreamer, set_seed

from ..checkpoints import (
    ROUTED_FOLDER,
    Access,
    load_processor,
    resolve_class,
    resolve_source,
    weight_files,
    whole_folder,
)
from ..data import UnreadProcessor
from ..errors import HfEsmError
from ..routing import RoutedModel
from ..utils import check_known
from .console import Outcome
from .device import add_device_flag
from .flags import add_trust_flags, count


LENGTH = 256  # tokens of an answer, where neither the user nor the model says how many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the merged model")
    parser.add_argument("--message", action="append", help="answer this message and leave; repeat for a conversation")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--task", help="the expert that answers, of a routed model (default: the router decides)")
    parser.add_argument(
        "--max-new-tokens", type=count, help=f"length of an answer (default: the model's, or {LENGTH})"
    )
    parser.add_argument("--seed", type=int, help="seed of sampling, if the model's settings sample")
    add_device_flag(parser)
    add_trust_flags(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    if (arguments.quiet or arguments.json) and not arguments.message:
        raise HfEsmError("--quiet and --json print the answers to messages: name them by --message TEXT.")
    chat = _open(arguments)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    said = []
    try:
        for message in arguments.message or _typed():
            said.append({"message": message, **chat.answer(message)})
    except KeyboardInterrupt:
        print()
    return Outcome("", said, "\n".join(turn["answer"] for turn in said))


def _typed() -> Iterator[str]:
    """The lines that the user types, up to an empty one or the end of the input."""
    with suppress(ImportError):  # on Windows
        import readline  # noqa: F401  (`input` then edits and repeats lines)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


class _Answer(TextStreamer):
    """Prints an answer while it is written, and keeps its text."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


@dataclass
class _Chat:
    """A conversation with a model.

    Attributes:
        model: the model that writes; of a routed model, its static model.
        processor: its tokenizer, or the processor that holds the tokenizer.
        routed: the routed model, if it is one.
        task: the task that the user named.
        messages: what was said, as chat templates take it.
    """

    model: PreTrainedModel
    processor: Any
    routed: Optional[RoutedModel]
    task: Optional[str]
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, message: str) -> dict[str, Any]:
        """Print the model's answer, and add it to the conversation.

        Returns:
            The answer; of a routed model the task, too, and how likely the router finds it.
        """
        self.messages.append({"role": "user", "content": message})
        inputs, decided = self._prompt(), {}
        if self.routed is not None:
            decided = {"task": self.task} if self.task else self._decided(inputs)
            sure = f" {decided['probability']:.2f}" if "probability" in decided else ""
            print(f"[{decided['task'] or 'none'}{sure}]", end=" ", flush=True)
        streamer = _Answer(_tokenizer(self.processor), skip_prompt=True, skip_special_tokens=True)
        writer = self.model if self.routed is None else self.routed
        with nullcontext() if self.task is None else self.routed.route(self.task):
            writer.generate(**{name: ids.to(self.model.device) for name, ids in inputs.items()}, streamer=streamer)
        self.messages.append({"role": "assistant", "content": streamer.text})
        return {"answer": streamer.text, **decided}

    def _prompt(self) -> dict[str, Any]:
        """The conversation as inputs of the model: by the chat template, else as plain text that goes on."""
        tokenizer = _tokenizer(self.processor)
        speaker = tokenizer if tokenizer.chat_template else self.processor
        if getattr(speaker, "chat_template", None):
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = speaker.apply_chat_template(self.messages, tokenize=True, **options)
        else:
            messages = self.messages
            if self.model.config.is_encoder_decoder:  # such models answer a text, and do not continue it
                messages = [m for m in messages[:-1] if m["role"] == "system"] + messages[-1:]
            inputs = tokenizer("\n".join(m["content"] for m in messages), return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _decided(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The task that the router decides on, and its probability; None for no task."""
        (explanation,) = self.routed.explain([{"input_ids": inputs["input_ids"][0]}])
        if explanation.task not in explanation.probabilities:
            return {"task": None}
        return {"task": explanation.task, "probability": explanation.probabilities[explanation.task]}


def _open(arguments: argparse.Namespace) -> _Chat:
    """Load the model.

    Raises:
        HfEsmError: if the model does not write or has no tokenizer, or the task does not fit it.
    """
    title, trust, pickle = arguments.model, arguments.trust_remote_code, arguments.allow_pickle
    folder = whole_folder(title, title)
    config, model_class = resolve_class(resolve_source(str(folder), title, Access(trust_remote_code=trust)))
    if not model_class.can_generate():
        raise HfEsmError(
            f"{title}: a {model_class.__name__} does not write. `hf-esm chat` is for language models; "
            "`hf-esm predict` gives the labels of a routed classifier."
        )
    processor = load_processor(folder, trust)
    if isinstance(processor, UnreadProcessor):
        raise HfEsmError(f"{title}: its tokenizer cannot be read: {processor.reason}")
    if not hasattr(_tokenizer(processor), "chat_template"):
        raise HfEsmError(f"{title}: no tokenizer in {folder}. Copy that of the base there.")
    routed = None
    if (folder / ROUTED_FOLDER).is_dir():
        routed = RoutedModel.from_pretrained(folder, allow_pickle=pickle, trust_remote_code=trust)
        routed = routed.to(PartialState().device)
        _check_task(routed, title, arguments.task)
        model = routed.model.get_base_model()
    elif arguments.task is not None:
        raise HfEsmError(f"{title}: `task` names a routed expert, and this model has none. Leave it out.")
    else:
        weight_files(folder, title, pickle)
        model = model_class.from_pretrained(folder, config=config).eval().to(PartialState().device)
    settings = model.generation_config
    settings.max_new_tokens = arguments.max_new_tokens or settings.max_new_tokens or LENGTH
    settings.max_length = None  # of prompt and answer
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return _Chat(model, processor, routed, arguments.task, system)


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _check_task(routed: RoutedModel, title: str, task: Optional[str]) -> None:
    if task is not None:
        check_known([task], [*routed.tasks, "static"], "expert for")
    elif not routed.config.decides:
        raise HfEsmError(f"{title}: this model has no router. Name the `task`: {', '.join(routed.tasks)}.")
