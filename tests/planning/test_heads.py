"""Which weights each task keeps: how often that is found out."""

from functools import wraps

from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_esm import merge_models
from support.helpers import perturbed


def model(kind, width, **settings):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": width}
    return kind(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes, **settings)).eval()


def test_what_feeds_only_heads_is_found_once_per_architecture(monkeypatch):
    """Over several merges, and whatever the labels are."""
    widths, forward = [], BertModel.forward

    @wraps(forward)
    def counted(self, *args, **kwargs):
        widths.append(self.config.intermediate_size)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", counted)
    for width in (41, 43):  # of no other test's model
        base = model(BertModel, width)
        experts = {}
        for task, labels in (("a", 2), ("b", 3)):
            classifier = model(BertForSequenceClassification, width, num_labels=labels)
            classifier.bert.load_state_dict(base.state_dict())
            experts[task] = perturbed(classifier, 0.01, labels)
        for method in ("mean", "ties"):
            plan = merge_models(base, experts, method=method, dry_run=True)
            for names in plan.heads.by_task.values():
                assert {name.partition(".")[0] for name in names} == {"pooler", "classifier"}
    assert widths == [41, 43]
