"""Model cards, from the templates in `model_cards/`."""

import re
from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import CARD_FILE
from ..version import __version__


def write_adapter_card(folder: Path, base: str, tasks: list[str], decides: bool, model_class: str) -> None:
    """Write `README.md` of a routed adapter that is stored apart from its static model.

    Args:
        folder: the adapter's folder.
        base: Hub id of the static model.
        tasks: names of the experts.
        decides: whether the adapter has a router.
        model_class: class of the static model.
    """
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        tags=["merge", "hf_esm", "routed-experts"],
    )
    ModelCard.from_template(
        data,
        template_str=template("routed_adapter.md"),
        base=base,
        tasks=tasks,
        decides=decides,
        model_class=model_class,
        version=__version__,
    ).save(folder / CARD_FILE)


def with_section(text: str, title: str, body: str) -> str:
    """A card's text with a section before its limits, in place of an earlier section of this title."""
    text = re.sub(rf"## {title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    before, limits, after = text.partition("## Limits")
    return f"{before.rstrip()}\n\n## {title}\n\n{body}\n\n{limits}{after}"


# The Hub's name of a task, by the end of a model class's name.
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
}


def pipeline_of(model_class: str) -> str:
    """The Hub's name of the task that a model class is for, `"other"` if it is not known."""
    return next((kind for ending, kind in _PIPELINES.items() if model_class.endswith(ending)), "other")


def template(name: str) -> str:
    """The text of a card's template, from the installed package or from the checkout in which it is developed."""
    packaged = resources.files("hf_esm") / "model_cards" / name
    source = packaged if packaged.is_file() else Path(__file__).parents[2] / "model_cards" / name
    return source.read_text(encoding="utf-8")
