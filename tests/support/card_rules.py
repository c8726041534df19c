"""The Hub's rules for the metadata of a model's card, as its documentation states them (huggingface.co/docs/hub:
model-cards, repositories-licenses, models-tasks). The Hub refuses or ignores what breaks them; test servers do not.
"""

import re
from typing import Any

import yaml


KEYS = {
    "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_link",
    "license_name", "metrics", "model-index", "new_version", "pipeline_tag", "tags", "thumbnail",
}  # fmt: skip
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LIBRARIES = {"transformers", "peft", "sentence-transformers"}
PIPELINES = {
    "any-to-any", "audio-classification", "audio-text-to-text", "audio-to-audio", "automatic-speech-recognition",
    "depth-estimation", "document-question-answering", "feature-extraction", "fill-mask", "image-classification",
    "image-feature-extraction", "image-segmentation", "image-text-to-text", "image-to-image", "image-to-text",
    "image-to-video", "keypoint-detection", "mask-generation", "multiple-choice", "object-detection",
    "question-answering", "sentence-similarity", "summarization", "table-question-answering", "tabular-classification",
    "tabular-regression", "text-classification", "text-generation", "text-ranking", "text-to-audio", "text-to-image",
    "text-to-speech", "text-to-video", "token-classification", "translation", "video-classification",
    "video-text-to-text", "visual-question-answering", "zero-shot-classification", "zero-shot-image-classification",
    "zero-shot-object-detection", "other",
}  # fmt: skip
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
REPOSITORY = re.compile(r"(?!.*(--|\.\.))([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")


def checked_metadata(card: str, *private: Any) -> dict[str, Any]:
    """The metadata of a card that keeps the rules.

    Args:
        private: folders of this machine, of which no path may be in the card.
    """
    assert not [path for path in private if str(path) in card]
    assert not re.search(r"(?<![\w.:/-])/(tmp|home|root|Users|mnt|work)/", card)
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    metadata = yaml.safe_load(found[1])
    assert metadata.keys() <= KEYS
    assert metadata["library_name"] in LIBRARIES
    assert metadata.get("pipeline_tag", "other") in PIPELINES
    assert all(isinstance(tag, str) and 0 < len(tag) < 100 for tag in metadata["tags"])
    assert len(set(metadata["tags"])) == len(metadata["tags"])
    bases = metadata.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    assert len(set(bases)) == len(bases) and all(REPOSITORY.fullmatch(base) for base in bases)
    assert ("base_model_relation" in metadata) == bool(bases)
    assert metadata.get("base_model_relation", "merge") in RELATIONS
    assert metadata.get("license", "other") in LICENCES
    assert "license_name" not in metadata or metadata["license"] == "other"
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", metadata.get("license_name", "x"))
    for model in metadata.get("model-index", []):
        assert re.fullmatch(r"[\w.-]+", model["name"])
        for result in model["results"]:
            assert result["task"]["type"] in PIPELINES
            assert result["dataset"].keys() >= {"type", "name"}
            for metric in result["metrics"]:
                assert isinstance(metric["type"], str) and isinstance(metric["value"], (int, float))
    return metadata
