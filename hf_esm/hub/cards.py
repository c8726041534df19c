"""Model cards, from the templates in `model_cards/`."""

import re
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import CARD_FILE
from ..utils import markdown_text, plain_text
from ..version import __version__


def write_adapter_card(
    folder: Path, base: str, tasks: list[str], decides: bool, model_class: str, repo_id: str
) -> None:
    """Write `README.md` of a routed adapter that is stored apart from its static model.

    Args:
        folder: the adapter's folder.
        base: Hub id of the static model.
        tasks: names of the experts.
        decides: whether the adapter has a router.
        model_class: class of the static model.
        repo_id: Hub id of the adapter.
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
        names=list(map(markdown_text, tasks)),
        decides=decides,
        model_class=model_class,
        repo_id=repo_id,
        version=__version__,
    ).save(folder / CARD_FILE)


# The Hub's name of a task, by the end of a model class's name.
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
}


def pipeline_of(model_class: str) -> str:
    """The Hub's name of the task that a model class is for, `"other"` if it is not known."""
    return next((kind for ending, kind in _PIPELINES.items() if model_class.endswith(ending)), "other")


# Identifiers of licences that the Hub knows (https://huggingface.co/docs/hub/repositories-licenses).
LICENCES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
    "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib",
    "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
}  # fmt: skip


def licence_metadata(stated: Collection[str]) -> dict[str, str]:
    """The licence of a merged model as the Hub's metadata has it.

    Args:
        stated: licences of all models, as their cards state them; `"not stated"` for none.

    Returns:
        `license`, if all models have the same; one that the Hub does not know is `other`, with a name.
    """
    if len(set(stated)) != 1 or "not stated" in stated:
        return {}
    (licence,) = set(stated)
    if licence in LICENCES:
        return {"license": licence}
    name = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")
    return {"license": "other"} | ({"license_name": name} if name else {})


def public_name(source: Any, repo_id: Optional[str], revision: Optional[str], root: Optional[Path]) -> str:
    """A model's name for a card, in Markdown: a link to its commit on the Hub, or the name of its folder.

    Where a folder lies on its owner's machine is nobody else's business.

    Args:
        source: the model in words, which may begin or end with its folder.
        repo_id: its id on the Hub, if it has one.
        revision: its commit on the Hub.
        root: its folder.
    """
    if repo_id:
        commit = f" @ [`{revision[:12]}`](https://huggingface.co/{repo_id}/tree/{revision})" if revision else ""
        return f"[`{repo_id}`](https://huggingface.co/{repo_id}){commit}"
    words = str(source)
    if root is not None and root.name:
        for folder in (str(root.absolute()), str(root)):
            words = words.replace(folder, root.name)
    words = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words.split(" "))
    words = plain_text(words).replace("`", "'")
    return f"`{words}`" if words else "a live model"


def template(name: str) -> str:
    """The text of a card's template, from the installed package or from the checkout in which it is developed."""
    packaged = resources.files("hf_esm") / "model_cards" / name
    source = packaged if packaged.is_file() else Path(__file__).parents[2] / "model_cards" / name
    return source.read_text(encoding="utf-8")
