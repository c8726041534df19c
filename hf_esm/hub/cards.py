"""Model cards, from the templates in `model_cards/`."""

import re
from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..tuners.routed import RoutedExpertsConfig
from ..version import __version__


def write_adapter_card(folder: Path, config: RoutedExpertsConfig) -> None:
    """Write `README.md` of a routed adapter that stands without its static model."""
    base = config.base_model_name_or_path
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
        tasks=config.tasks,
        decides=config.decides,
        model_class=(config.auto_mapping or {}).get("base_model_class", "AutoModel"),
        version=__version__,
    ).save(folder / "README.md")


def with_section(text: str, title: str, body: str) -> str:
    """A card's text with a section of this title before its limits, in place of an earlier one."""
    text = re.sub(rf"## {title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    before, limits, after = text.partition("## Limits")
    return f"{before.rstrip()}\n\n## {title}\n\n{body}\n\n{limits}{after}"


# The Hub's name of a task, by how the class of its model ends.
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
}


def pipeline_of(model_class: str) -> str:
    return next((kind for ending, kind in _PIPELINES.items() if model_class.endswith(ending)), "other")


def template(name: str) -> str:
    """A card's template, from the installed package or from the checkout that it is developed in."""
    packaged = resources.files("hf_esm") / "model_cards" / name
    source = packaged if packaged.is_file() else Path(__file__).parents[2] / "model_cards" / name
    return source.read_text(encoding="utf-8")
