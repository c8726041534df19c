"""Any encoder, decoder or encoder-decoder goes through `merge_models`, and every weight follows its formula."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from hf_esm.calibration.collection import collect_statistics
from hf_esm.calibration.statistics import ActivationStatistics
from hf_esm.data.batches import collate
from support.architectures import ARCHITECTURES
from support.helpers import (
    LENGTHS,
    RULES,
    Architecture,
    Samples,
    check_weights,
    expected_updates,
    floating_weights,
    merge,
    pairs,
    perturbed,
    reloaded,
    save,
    stored_tensors,
    text_samples,
    with_end,
)
from support.problems import relative_error


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning"),  # on the labels of EncoderDecoderModel
]

# Every architecture by the default method, and the other methods on some.
CASES = [(name, "esm") for name in ARCHITECTURES] + [
    ("roberta", "esm-roberta"),
    ("gpt2", "esm-roberta"),
    ("vit", "esm-vit"),
    ("clip-vision", "esm-vit"),
    ("bert", "tsv-m"),
    ("t5", "tsv-m"),
    ("mixtral", "tsv-m"),
    ("mixtral", "esm-roberta"),
    ("swin", "mean"),
    ("wav2vec2", "mean"),
    ("gpt-oss", "mean"),
    ("gpt2", "task-arithmetic"),
    ("clip", "task-arithmetic"),
]
THREE_EXPERTS = ("bert", "gpt2", "vit", "bart")


def build(name: str, folder: Path, count: int = 2, **settings: Any) -> tuple[PreTrainedModel, list, str, list[str]]:
    """A base, its experts, and the folders that they are saved in."""
    base = ARCHITECTURES[name].build(**settings)
    experts = [perturbed(base, 0.05, 1 + i) for i in range(count)]
    return base, experts, save(base, folder / "base"), [save(e, folder / f"e{i}") for i, e in enumerate(experts)]


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.cases(16)
@pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_every_weight_follows_its_formula(name: str, method: str, tmp_path: Path) -> None:
    architecture, output = ARCHITECTURES[name], tmp_path / "merged"
    base, experts, base_folder, folders = build(name, tmp_path, 3 if name in THREE_EXPERTS else 2)
    merge(base_folder, folders, architecture, output, method)

    merged = reloaded(base, output)
    updates = expected_updates(base, experts, architecture, RULES[method])
    assert updates.keys() == floating_weights(base).keys()  # nothing is left out
    check_weights(base, merged, updates)

    # On disk it is what `save_pretrained` made of the base: names, shapes, dtypes, each tied weight once.
    ours, theirs = stored_tensors(output), stored_tensors(tmp_path / "base")
    assert {key: (t.dtype, t.shape) for key, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in theirs.items()}
    for file in ("config.json", "generation_config.json"):
        assert (output / file).exists() == (tmp_path / "base" / file).exists(), file
    assert json.loads((output / "config.json").read_text()) == json.loads(
        (Path(base_folder) / "config.json").read_text()
    )


def test_the_table_is_as_hard_as_it_claims() -> None:
    models = [architecture.build() for architecture in ARCHITECTURES.values()]
    assert sum(bool(model.all_tied_weights_keys) for model in models) >= 10
    assert any(not tensor.is_floating_point() for model in models for tensor in model.state_dict().values())
    for model in models:
        assert all(weight.ne(0).all() for weight in floating_weights(model).values()), type(model).__name__


@pytest.mark.parametrize("name", ["gpt2", "bert", "qwen3-moe"])
def test_half_precision_stays(name: str, tmp_path: Path) -> None:
    """bfloat16 in, bfloat16 out, with float32 or better between."""
    architecture = ARCHITECTURES[name]
    base, experts, base_folder, folders = build(name, tmp_path, dtype=torch.bfloat16)
    base, experts = base.bfloat16(), [expert.bfloat16() for expert in experts]
    for model, folder in zip([base, *experts], [base_folder, *folders]):
        model.save_pretrained(folder)
    merge(base_folder, folders, architecture, tmp_path / "merged", "tsv-m")
    merged, updates = (
        reloaded(base, tmp_path / "merged"),
        expected_updates(base, experts, architecture, RULES["tsv-m"]),
    )
    assert merged.dtype == torch.bfloat16
    for key, weight in floating_weights(merged).items():
        assert weight.dtype == torch.bfloat16, key
        expected = floating_weights(base)[key].double() + updates[key]
        # To the nearest, but for a few halves that the formula's own last digit decides.
        assert (weight.double() != expected.bfloat16().double()).double().mean() < 0.01, key
    merge(base_folder, folders, architecture, tmp_path / "calibrated")
    calibrated = stored_tensors(tmp_path / "calibrated")
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in calibrated.values() if t.is_floating_point())


@pytest.mark.parametrize("name", ["gpt2", "qwen3-moe", "resnet"])
def test_dtype_and_shards(name: str, tmp_path: Path) -> None:
    base, _, base_folder, folders = build(name, tmp_path)
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    merge(base_folder, folders, ARCHITECTURES[name], whole)
    merge(base_folder, folders, ARCHITECTURES[name], shards, dtype="bfloat16", max_shard_size="4KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    rounded = {k: t.bfloat16() if t.is_floating_point() else t for k, t in stored_tensors(whole).items()}
    assert same_tensors(stored_tensors(shards), rounded)
    assert reloaded(base, shards).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "mixtral", "qwen3-moe"])
def test_files_are_as_large_as_they_may_be(name: str, tmp_path: Path) -> None:
    """Also where experts that are one tensor in memory stand by themselves on disk."""
    _, _, base_folder, folders = build(name, tmp_path)
    size = sum(tensor.nbytes for tensor in stored_tensors(tmp_path / "base").values())
    for limit, files in ((size + 1, 1), (size - 1, 2)):
        merge(base_folder, folders, ARCHITECTURES[name], tmp_path / str(limit), "mean", max_shard_size=limit)
        assert len(list((tmp_path / str(limit)).glob("model*.safetensors"))) == files


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "clip", "mixtral", "deberta-v3", "marian"])
def test_live_models(name: str, tmp_path: Path) -> None:
    """They merge as their folders do, and are left exactly as they were."""
    base, experts, base_folder, folders = build(name, tmp_path)
    for model in (base, *experts):
        model.train()
        next(model.children()).eval()
        next(model.parameters()).requires_grad_(False)

    def state(model: PreTrainedModel) -> list:
        modules = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        parameters = [(p.data_ptr(), p.requires_grad, p.grad) for p in model.parameters()]
        return [modules, parameters, model.config.to_dict(), sorted(vars(model))]

    before = [(state(model), copy.deepcopy(model.state_dict())) for model in (base, *experts)]
    merge(base_folder, folders, ARCHITECTURES[name], tmp_path / "folders")
    merge(base, experts, ARCHITECTURES[name], tmp_path / "live")
    assert same_tensors(stored_tensors(tmp_path / "live"), stored_tensors(tmp_path / "folders"))
    assert (tmp_path / "live/generation_config.json").exists() == base.can_generate()
    for model, (then, weights) in zip((base, *experts), before):
        assert state(model) == then
        assert same_tensors(model.state_dict(), weights)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["vit", "deberta-v3", "switch", "wav2vec2-group-norm"])
def test_batch_size_changes_nothing(name: str, tmp_path: Path) -> None:
    _, _, base_folder, folders = build(name, tmp_path)
    found = []
    for size in (1, 16):
        merge(base_folder, folders, ARCHITECTURES[name], tmp_path / str(size), batch_size=size)
        found.append(stored_tensors(tmp_path / str(size)))
    for key, tensor in found[0].items():
        assert relative_error(found[1][key], tensor) < 1e-5, key


def padded(rows: Samples, name: str, left: bool = False) -> Samples:
    """Rows that come padded to one length, as tokenizers and loaders make them."""
    longest = max(LENGTHS) + 2
    found = []
    for row in rows:
        missing = longest - len(row[name])
        sides = (missing, 0) if left else (0, missing)
        value = torch.nn.functional.pad(row[name], sides, value=-100 if name == "labels" else 1)
        found.append({**row, name: value})
        if name == "input_ids":
            mask = torch.nn.functional.pad(torch.ones_like(row[name]), sides)
            found[-1] |= {"attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
    return found


@pytest.mark.parametrize("case", ["bert-left", "bert-right", "t5-targets", "whisper-targets"])
def test_padding_in_rows_is_no_token(case: str, tmp_path: Path) -> None:
    name, side = case.split("-")
    architecture, column = ARCHITECTURES[name], "labels" if side == "targets" else "input_ids"
    _, _, base_folder, folders = build(name, tmp_path)
    rows = {f"t{i}": padded(architecture.samples(i), column, side == "left") for i in range(2)}
    merge(base_folder, folders, architecture, tmp_path / "plain")
    merge(base_folder, folders, architecture, tmp_path / "padded", calibration=rows)
    for key, tensor in stored_tensors(tmp_path / "plain").items():
        assert relative_error(stored_tensors(tmp_path / "padded")[key], tensor) < 1e-5, key


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["bert", "deberta-v3", "llama", "mamba", "convbert", "xlnet", "longformer"])
def test_texts_of_unlike_length_are_calibrated_together_where_padding_does_not_show(name: str) -> None:
    model, rows = ARCHITECTURES[name].build(), text_samples(0)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda *args: sizes.append(len(args[2]["input_ids"])), with_kwargs=True)
    collect_statistics(model, rows, batch_size=5, progress=False)
    lengths = sorted(Counter(LENGTHS).items(), reverse=True)
    shows = name in ("convbert", "xlnet", "longformer")  # neighbours, another layout, padding of its own
    assert sizes[-len(lengths) :] == [count for _, count in lengths] if shows else sizes[-2:] == [5, 2]


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "convbert"])
def test_how_a_body_reads_batches_is_learned_once(name: str) -> None:
    """Of its fine-tunes, the next ones take it over; of another body, or of samples of one shape, it is learned."""
    architecture, rows, readings = ARCHITECTURES[name], text_samples(0), {}
    passes: list[int] = []

    def collect(model: PreTrainedModel, rows: list[dict[str, Tensor]], **known: Any) -> ActivationStatistics:
        passes.append(0)
        handle = model.register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))
        found = collect_statistics(model, rows, batch_size=5, progress=False, **known)
        handle.remove()
        return found

    first, second = architecture.build(), architecture.build()
    alone = collect(second, rows)
    collect(first, rows, readings=readings)
    shared = collect(second, rows, readings=readings)
    assert passes == [passes[0], passes[0], passes[0] - 3]
    assert shared.keys_of == alone.keys_of
    for weight in alone:
        assert torch.equal(shared[weight].factor, alone[weight].factor)
    other = architecture.build()
    other.config.hidden_dropout_prob = 0.7
    collect(other, rows, readings=readings)
    collect(second, [rows[0], rows[0]], readings=readings)
    assert passes[3:] == [passes[0], 3]


class SomeTokens(PreTrainedModel):
    """One map reads the even tokens alone, as experts in modules of their own read some."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(60, 8)
        self.expert, self.rest = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Optional[Tensor] = None) -> None:
        hidden = self.embedding(input_ids)
        self.rest(hidden)
        even = input_ids % 2 == 0
        if (chosen := even if attention_mask is None else even & attention_mask.bool()).any():
            self.expert(hidden[chosen])


@pytest.mark.parametrize("odd", [4, 12], ids=["the-shortest", "a-longer"])
def test_a_map_that_reads_some_tokens_is_calibrated_on_all_of_them(odd: int) -> None:
    """Though one of the texts has none for it."""
    model = SomeTokens(PretrainedConfig(pad_token_id=0))
    rows = [{"input_ids": torch.arange(3, 3 + length)} for length in range(4, 16)]
    rows[odd - 4]["input_ids"] = 2 * rows[odd - 4]["input_ids"] + 1
    found = collect_statistics(model, rows, batch_size=12, progress=False)
    ids = torch.cat([row["input_ids"] for row in rows])
    for name, read in (("rest.weight", ids), ("expert.weight", ids[ids % 2 == 0])):
        inputs = model.embedding.weight[read].detach()
        assert found[name].count == len(read)
        assert relative_error(found[name].factor.T @ found[name].factor, inputs.T @ inputs) < 1e-5


@pytest.mark.parametrize(("name", "head"), [("bert", "BertForSequenceClassification"), ("t5", None)])
@torch.no_grad()
def test_where_a_batch_is_padded_it_says_so(name: str, head: Optional[str]) -> None:
    """For scores, samples of unlike lengths share a batch; each gets what it gets alone."""
    model = ARCHITECTURES[name].build(head)
    rows = text_samples(0)
    if model.config.is_encoder_decoder:
        rows = [row | {"decoder_input_ids": row["input_ids"]} for row in rows]
    together = model(**collate(rows, model.config)).logits
    for row, found in zip(rows, together):
        alone = model(**{key: value[None] for key, value in row.items()}).logits[0]
        assert relative_error(found[: len(alone)], alone) < 1e-5


def test_no_token_at_all_is_an_error(tmp_path: Path) -> None:
    _, _, base_folder, folders = build("bert", tmp_path)
    nothing = [{"input_ids": torch.ones(4, dtype=torch.long), "attention_mask": torch.zeros(4, dtype=torch.long)}]
    with pytest.raises(ValueError, match="sample 0 has no real token"):
        merge(
            base_folder, folders, ARCHITECTURES["bert"], tmp_path / "out", calibration={"t0": nothing, "t1": nothing}
        )


def sources_only(architecture: Architecture) -> Architecture:
    def samples(seed: int) -> Samples:
        return [{k: v for k, v in sample.items() if k != "labels"} for sample in architecture.samples(seed)]

    return replace(architecture, samples=samples)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_without_targets_an_encoder_decoder_reads_what_it_writes(name: str, tmp_path: Path) -> None:
    architecture = sources_only(ARCHITECTURES[name])
    base = architecture.build()
    experts = [perturbed(base, 0.05, 1 + i) for i in range(2)]
    for model in (base, *experts):
        model.generation_config.update(forced_eos_token_id=None, max_length=33)
        with torch.no_grad():  # so that some end early
            model.get_output_embeddings().weight[2] *= 5

    def written(seed: int) -> Samples:
        rows = architecture.samples(seed)
        ids = [GenerationMixin.generate(experts[seed], **{k: v[None] for k, v in row.items()})[0] for row in rows]
        return pairs(rows, [{"decoder_input_ids": found} for found in ids])

    assert all(len({len(row["decoder_input_ids"]) for row in written(seed)}) > 1 for seed in range(2))
    merge(base, experts, architecture, tmp_path / "merged")
    explicit = replace(architecture, samples=written)
    check_weights(base, reloaded(base, tmp_path / "merged"), expected_updates(base, experts, explicit, RULES["esm"]))


@pytest.mark.parametrize(
    ("name", "model_class"), [("bart", "BartModel"), ("t5", "T5Model"), ("bart", "BartForSequenceClassification")]
)
def test_what_cannot_write_reads_its_source_again(name: str, model_class: str, tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURES[name], model_class=model_class, samples=with_end)
    base = architecture.build()
    base.config.id2label = {i: f"class {i}" for i in base.config.id2label}  # heads that predict the same are merged
    experts = [perturbed(base, 0.05, 1 + i) for i in range(2)]
    merge(base, experts, architecture, tmp_path / "merged")
    start = torch.tensor([base.config.decoder_start_token_id])

    def samples(seed: int) -> Samples:
        rows = with_end(seed)
        return [row | {"decoder_input_ids": torch.cat([start, row["input_ids"][:-1]])} for row in rows]

    explicit = replace(architecture, samples=samples)
    check_weights(base, reloaded(base, tmp_path / "merged"), expected_updates(base, experts, explicit, RULES["esm"]))


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "dare", "task-arithmetic", "ties"])
def test_running_averages_are_averaged_whatever_the_method(method: str, tmp_path: Path) -> None:
    """Beyond the experts' own, as α above 1 or dropping and scaling takes weights, a variance may be negative."""
    base = ARCHITECTURES["resnet"].build()
    experts = [copy.deepcopy(base) for _ in range(4)]
    with torch.no_grad():
        for i, expert in enumerate(experts):
            for name, value in expert.state_dict().items():
                if "running_var" in name:
                    value.mul_(0.1 * (i + 1))
                elif value.is_floating_point():
                    value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i)))
    merge(base, experts, ARCHITECTURES["resnet"], tmp_path / "merged", method, alpha=3.0)
    found, buffers = reloaded(base, tmp_path / "merged").state_dict(), dict(base.named_buffers())
    averaged = [name for name, value in buffers.items() if value.is_floating_point()]
    assert any("running_var" in name for name in averaged)
    for name in averaged:
        expected = torch.stack([expert.state_dict()[name] for expert in experts]).mean(0)
        assert torch.allclose(found[name], expected, rtol=1e-5), name


def test_heads_that_the_base_ties_are_mentioned(tmp_path: Path) -> None:
    """Each task keeps its own: the merged model, like the base, has none."""
    base = ARCHITECTURES["llama"].build(tie_word_embeddings=True)
    experts = [perturbed(ARCHITECTURES["llama"].build(tie_word_embeddings=False), 0.05, i) for i in range(2)]
    result = merge(base, experts, ARCHITECTURES["llama"], tmp_path / "merged", "mean")
    tied = [warning for warning in result.warnings if "tied to the embeddings in the base" in warning]
    assert len(tied) == 2 and all("stores 'lm_head.weight' of its own" in warning for warning in tied)
    assert torch.equal(result.load_task_model("t1").lm_head.weight, experts[1].lm_head.weight)


def test_old_names_on_disk(tmp_path: Path) -> None:
    base, experts, base_folder, folders = build("bert", tmp_path)
    for folder in (base_folder, folders[1]):
        tensors = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for key, tensor in stored_tensors(Path(folder)).items()
        }
        assert any(key.endswith("gamma") for key in tensors)
        tensors["embeddings.position_ids"] = torch.arange(40)[None]  # saved by old versions
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
    result = merge(base_folder, folders, ARCHITECTURES["bert"], tmp_path / "merged")
    assert not result.warnings
    updates = expected_updates(base, experts, ARCHITECTURES["bert"], RULES["esm"])
    check_weights(base, reloaded(base, tmp_path / "merged"), updates)


def test_dispensable_weights_may_be_missing(tmp_path: Path) -> None:
    _, _, base_folder, folders = build("bart", tmp_path)
    for folder in (base_folder, *folders):
        tensors = stored_tensors(Path(folder))
        del tensors["final_logits_bias"]
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
    merge(base_folder, folders, ARCHITECTURES["bart"], tmp_path / "merged")
    assert stored_tensors(tmp_path / "merged").keys() == tensors.keys()


def test_extra_weights_of_the_base_stay(tmp_path: Path) -> None:
    """As in bert-base-uncased: a masked language model whose file also holds a pooler and another head."""
    _, _, base_folder, folders = build("roberta", tmp_path)
    extra = {"roberta.pooler.dense.weight": torch.randn(32, 32), "cls.seq_relationship.bias": torch.randn(2)}
    save_file(stored_tensors(Path(base_folder)) | extra, Path(base_folder) / "model.safetensors", {"format": "pt"})
    merge(base_folder, folders, ARCHITECTURES["roberta"], tmp_path / "merged")
    ours, theirs = stored_tensors(tmp_path / "merged"), stored_tensors(Path(base_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in extra.items())
