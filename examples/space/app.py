"""A Gradio app over a routed model: which expert answers, how sure the router is, and the labels or the text.

    pip install ".[space]" && python examples/space/app.py FOLDER_OR_ID

As a Space on the Hub, the app reads the model's id from the variable `HF_ESM_MODEL`.
"""

import os
import sys
from typing import Any, Optional

import gradio as gr
import torch

from hf_esm import HfEsmError, RoutedModel


VARIABLE = "HF_ESM_MODEL"
ROUTER = "the router decides"
LENGTH = 128  # tokens of an answer


def tokenizer_of(routed: RoutedModel) -> Any:
    return getattr(routed.processor, "tokenizer", routed.processor)


def writes(routed: RoutedModel) -> bool:
    return routed.model.get_base_model().can_generate()


def prompt_of(routed: RoutedModel, text: str) -> dict[str, torch.Tensor]:
    """A message as the model's chat template writes it, or the text as it is."""
    tokenizer = tokenizer_of(routed)
    if getattr(tokenizer, "chat_template", None):
        talk = [{"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(talk, tokenize=True, **options)
    else:
        inputs = tokenizer(text, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def who_answers(routed: RoutedModel, sample: Any, task: Optional[str]) -> tuple[str, dict[str, float]]:
    """A sentence that says which expert answers, and the probability of every task."""
    if task:
        return f"**{task}** answers, as you asked.", {task: 1.0}
    (why,) = routed.explain([sample])
    if why.task not in why.probabilities:
        return "**No expert** answers: the input is far from all tasks.", why.probabilities
    sure = "" if why.sure else ", but is not sure"
    return f"**{why.task}** answers: the router finds it {why.probabilities[why.task]:.0%} likely{sure}.", (
        why.probabilities
    )


@torch.no_grad()
def answer(routed: RoutedModel, content: Any, second: str = "", task: str = ROUTER) -> tuple[str, dict, Any]:
    """Answer one input.

    Args:
        routed: the model.
        content: a text, or a picture.
        second: the second text of a pair, if there is one.
        task: the task whose expert answers, or `ROUTER`.

    Returns:
        Which expert answers, in a sentence; how likely every task is; and the probabilities of the task's labels, or
        the text that a language model writes.
    """
    if content is None or content == "":
        raise gr.Error("Give the model something to read.")
    named = None if task == ROUTER else task
    if writes(routed):
        inputs = prompt_of(routed, content)
        sentence, tasks = who_answers(routed, {"input_ids": inputs["input_ids"][0]}, named)
        written = routed.generate(**inputs, tasks=named, max_new_tokens=LENGTH)[0]
        if not routed.model.get_base_model().config.is_encoder_decoder:
            written = written[inputs["input_ids"].shape[1] :]
        return sentence, tasks, tokenizer_of(routed).decode(written, skip_special_tokens=True)
    sample = (content, second) if second else content
    sentence, tasks = who_answers(routed, sample, named)
    (prediction,) = routed.predict([sample], named, probabilities=True)
    if len(prediction.probabilities) == 1:  # one value, which is no probability
        return sentence, tasks, f"{prediction.label}: {prediction.score:.3g}"
    return sentence, tasks, prediction.probabilities


def build(model: str) -> gr.Blocks:
    """Load a routed model, from a folder or the Hub, and make the app."""
    routed = RoutedModel.from_pretrained(model)
    whole = routed.model.get_base_model()
    images = whole.main_input_name == "pixel_values"
    mode = "L" if getattr(whole.config, "num_channels", 3) == 1 else "RGB"
    choices = [*([ROUTER] if routed.config.decides else []), *routed.tasks]
    with gr.Blocks(title="A routed model") as app:
        gr.Markdown(
            f"# {len(routed.tasks)} experts in one model\n{', '.join(routed.tasks)}; merged by hf_esm (ESM++)."
        )
        with gr.Row():
            with gr.Column():
                content = (
                    gr.Image(type="pil", image_mode=mode, height=240, label="Picture")
                    if images
                    else gr.Textbox(label="Text", lines=4)
                )
                second = gr.Textbox(label="Second text, of tasks on pairs", visible=not images and not writes(routed))
                task = gr.Dropdown(choices, value=choices[0], label="Expert")
                button = gr.Button("Answer", variant="primary")
            with gr.Column():
                sentence = gr.Markdown()
                tasks = gr.Label(label="Task")
                result = gr.Textbox(label="Answer", lines=6) if writes(routed) else gr.Label(label="Answer")

        def on_click(content: Any, second: str, task: str) -> tuple[str, dict, Any]:
            try:
                return answer(routed, content, second, task)
            except HfEsmError as error:
                raise gr.Error(str(error)) from error

        button.click(on_click, [content, second, task], [sentence, tasks, result], api_name="answer")
    return app


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else os.environ.get(VARIABLE)
    if not model:
        sys.exit(f"Name the routed model: python app.py FOLDER_OR_ID, or {VARIABLE}=FOLDER_OR_ID.")
    build(model).launch()
