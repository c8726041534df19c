"""Agreement with an expert on samples without labels, against literal float64 formulas, one sample at a time."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_esm import HfEsmError
from hf_esm.errors import DamagedFileError
from hf_esm.metrics import Agreement, ExpertAnswers, agreement_of, collect_answers, divergence, in_vocabulary
from hf_esm.metrics.answers import lumped_log_probabilities
from support.architectures import ARCHITECTURES
from support.helpers import VOCABULARY, perturbed, text_samples
from support.problems import SEEDS, seeds
from support.tiny import BERT


LLAMA = ARCHITECTURES["llama"]
EOS = 2
WHOLE = 10**6  # more tokens than any vocabulary has


def figures(agreement):
    return agreement.kind, agreement.divergence, agreement.equal, agreement.count


def answers_of(model, samples, **settings):
    return collect_answers(model, samples, progress=False, **settings)


@torch.no_grad()
def output_of(model, sample):
    """Output on one sample in float64."""
    inputs = {name: v.double()[None] if v.is_floating_point() else v[None] for name, v in sample.items()}
    return copy.deepcopy(model).double()(**inputs)


def literal_kl(expert, model):
    """Per row, the sum of p log(p / q), of logits."""
    p, q = expert.double().softmax(-1), model.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def literal_lumped(expert, model, top):
    """The same of the expert's `top` likeliest classes and the sum of all others."""
    divergences = []
    for p, q in zip(expert.double().softmax(-1), model.double().softmax(-1)):
        kept = p.argsort(descending=True)[:top]
        p, q = (torch.cat([x[kept], 1 - x[kept].sum()[None]]) for x in (p, q))
        divergences.append((p * (p / q).log()).sum())
    return torch.stack(divergences)


def pair(architecture, seed, scale=0.1, **settings):
    base = architecture.build(**settings)
    return base, perturbed(base, scale, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
@torch.no_grad()
def test_tokens_by_the_literal_divergence(name, seed):
    base, expert = pair(ARCHITECTURES[name], seed)
    samples, ends = text_samples(seed), 0 if name == "roberta" else 1
    logits = [
        [output_of(model, s).logits[0, : len(s["input_ids"]) - ends] for model in (expert, base)] for s in samples
    ]
    whole = torch.cat([literal_kl(*both) for both in logits])
    answers = answers_of(expert, samples, top=WHOLE)
    assert answers.kind == "tokens"
    found = agreement_of(base, answers)
    assert found.count == len(whole) == sum(len(s["input_ids"]) - ends for s in samples)
    assert found.divergence == pytest.approx(float(whole.mean()), rel=1e-5, abs=1e-6)
    equal = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in logits])
    assert found.equal == pytest.approx(float(equal.double().mean()))
    assert found.equal < 1
    chosen = [4, 0, 3]
    some = torch.cat([literal_kl(*logits[i]) for i in chosen])
    assert divergence(base, answers, chosen).item() == pytest.approx(float(some.mean()), rel=1e-5, abs=1e-6)
    assert agreement_of(base, answers, chosen).divergence == pytest.approx(float(some.mean()), rel=1e-5, abs=1e-6)
    before = 0.0
    for top in (1, 5, 20, VOCABULARY - 1):
        answers = answers_of(expert, samples, top=top)
        assert answers.answers[0]["ids"].shape[1] == top
        lumped = torch.cat([literal_lumped(*both, top) for both in logits])
        assert (lumped < whole + 1e-9).all()
        lower = agreement_of(base, answers).divergence
        assert lower == pytest.approx(float(lumped.mean()), rel=1e-4, abs=1e-6)
        assert before < lower < found.divergence * (1 + 1e-5)
        before = lower


@pytest.mark.parametrize(
    ("name", "weights", "step", "tolerance"),
    [
        ("gpt2", ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"], 1e-5, 1e-6),
        # Llama's norms and rotations are float32, also in a float64 model.
        ("llama", ["model.layers.0.self_attn.v_proj.weight", "lm_head.weight"], 3e-3, 1e-3),
    ],
)
@pytest.mark.parametrize("top", [7, WHOLE])
def test_the_gradient_by_finite_differences(name, weights, step, tolerance, top):
    base, expert = pair(ARCHITECTURES[name], SEEDS[0])
    answers = answers_of(expert, text_samples(1)[:3], top=top)
    base = base.double()
    for weight in weights:
        parameter = base.get_parameter(weight)
        gradient = torch.autograd.grad(divergence(base, answers, range(3)), parameter)[0]
        assert gradient.dtype == torch.float64
        along = gradient / gradient.norm()
        values = []
        with torch.no_grad():
            for move in (step, -2 * step):
                parameter.add_(along, alpha=move)
                values.append(float(divergence(base, answers, range(3))))
            parameter.add_(along, alpha=step)
        assert float(gradient.norm()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=tolerance)


def test_a_sure_expert_and_a_sure_model_have_finite_gradients(tmp_path):
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))

    class Writer(torch.nn.Module):
        """Logits that do not depend on the tokens."""

        def __init__(self, rows):
            super().__init__()
            self.logits, self.config, self.dtype = torch.nn.Parameter(rows), LLAMA.build().config, rows.dtype

        def can_generate(self):
            return True

        def forward(self, input_ids, attention_mask=None):
            return type("Output", (), {"logits": self.logits.expand(len(input_ids), -1, -1)})

    samples = [{"input_ids": torch.tensor([5, 6, 7])}]
    expert, model = (Writer(rows) for rows in logits)
    with torch.no_grad():
        expert.logits[0, 4], model.logits[0, 1] = 500.0, 500.0  # all others have no probability in float32
        model.logits[1, 2], expert.logits[1, 2] = -torch.inf, -torch.inf
    for top in (2, 8, 9):
        path = answers_of(expert, samples, top=top).save(tmp_path / "sure.safetensors")
        loss = divergence(model, ExpertAnswers.load(path, samples), [0])
        assert 200 < loss.detach() < 300
        (gradient,) = torch.autograd.grad(loss, model.logits)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "mixtral", "t5", "bart", "mbart", "whisper"])
def test_neither_batches_nor_padding_change_agreement(name):
    architecture = ARCHITECTURES[name]
    (base, expert), samples = pair(architecture, 2), architecture.samples(2)
    check_batches(base, expert, samples)


@pytest.mark.parametrize("name", ["siglip", "convbert", "fnet", "xlnet", "wav2vec2", "longformer"])
def test_models_that_read_padding_get_none(name):
    architecture = ARCHITECTURES[name]
    (base, expert), samples = pair(architecture, 2), architecture.samples(2)
    check_batches(base, expert, samples)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "BertForTokenClassification"),
        ("bert", "BertForQuestionAnswering"),
        ("xlnet", "XLNetForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_heads_are_read_alike_in_all_batches(name, head):
    architecture = ARCHITECTURES[name]
    base = architecture.build(head)
    expert, samples = perturbed(base, 0.1, 3), architecture.samples(3)
    assert answers_of(expert, samples).kind == "classes"
    check_batches(base, expert, samples)


def test_classifiers_without_a_padding_token_read_one_text_at_a_time():
    base = LLAMA.build("LlamaForSequenceClassification", pad_token_id=None)
    check_batches(base, perturbed(base, 0.1, 3), text_samples(3))


def test_choices_share_a_batch_by_their_shape():
    base = BERT.build("BertForMultipleChoice")
    texts = [sample["input_ids"] for sample in text_samples(3)]
    samples = [{"input_ids": torch.stack([ids, ids.flip(0), ids // 2 + 1][: 2 + len(ids) % 2])} for ids in texts]
    check_batches(base, perturbed(base, 0.2, 3), samples)


def check_batches(base, expert, samples):
    alone = answers_of(expert, samples, batch_size=1, top=20)
    together = answers_of(expert, samples, batch_size=len(samples), top=20)
    expected = agreement_of(base, alone, batch_size=1)
    assert expected.divergence > 1e-4
    for answers, size in ((alone, len(samples)), (together, 1), (together, 3)):
        found = agreement_of(base, answers, batch_size=size)
        assert found.divergence == pytest.approx(expected.divergence, abs=1e-5, rel=1e-5)
        assert (found.equal, found.count) == (expected.equal, expected.count)
    mean = divergence(base, together, range(len(samples))).item()
    assert mean == pytest.approx(expected.divergence, abs=1e-5, rel=1e-5)
    itself = agreement_of(expert, alone, batch_size=3)
    assert abs(itself.divergence) < 1e-5
    assert itself.equal in (1.0, None)
    assert itself.gain_over(expected) == pytest.approx(1, abs=1e-3)


def test_a_decoder_is_compared_up_to_the_end_of_its_own_inputs():
    base = ARCHITECTURES["t5"].build()
    expert = perturbed(base, 0.1, 1)
    ids, source = torch.tensor([0, 7, 8, EOS]), torch.tensor([5, 6, 9, EOS])
    logits = [output_of(m, {"input_ids": source, "decoder_input_ids": ids}).logits[0, :3] for m in (expert, base)]
    answers = answers_of(expert, [{"input_ids": source, "decoder_input_ids": ids}], top=WHOLE)
    found = agreement_of(base, answers)
    assert found.count == 3
    assert found.divergence == pytest.approx(float(literal_kl(*logits).mean()), rel=1e-5, abs=1e-6)
    targets = torch.tensor([7, 8, EOS])
    of_targets = answers_of(expert, [{"input_ids": source, "labels": targets}], top=WHOLE)
    assert agreement_of(base, of_targets).divergence == pytest.approx(found.divergence, rel=1e-5, abs=1e-6)
    assert agreement_of(base, of_targets).count == 3
    both = answers_of(expert, [{"input_ids": source, "decoder_input_ids": ids, "labels": targets[:2]}], top=WHOLE)
    assert figures(agreement_of(base, both)) == figures(found)
    bart = ARCHITECTURES["bart"].build()
    begun = [{"input_ids": source, "decoder_input_ids": torch.tensor([EOS, 7, 8, EOS])}]
    assert agreement_of(bart, answers_of(bart, begun)).count == 3  # BART begins with its end-of-sequence token
    with pytest.raises(HfEsmError, match=r"T5ForConditionalGeneration.*needs `decoder_input_ids` or `labels`"):
        answers_of(expert, [{"input_ids": source}])


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_by_their_probabilities(seed):
    base, samples = BERT.build(), text_samples(seed)
    expert = perturbed(base, 0.2, seed)
    p, q = (torch.cat([output_of(m, s).logits for s in samples]) for m in (expert, base))
    answers = answers_of(expert, samples, batch_size=3)
    assert answers.kind == "classes"
    found = agreement_of(base, answers, batch_size=2)
    assert found.count == len(samples)
    assert found.divergence == pytest.approx(float(literal_kl(p, q).mean()), rel=1e-5, abs=1e-6)
    assert found.equal == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert found.score(found) == found.equal
    assert divergence(base, answers, [1, 5]).item() == pytest.approx(
        float(literal_kl(p, q)[[1, 5]].mean()), rel=1e-5, abs=1e-6
    )


def test_several_labels_by_the_probability_of_each():
    base, samples = BERT.build(problem_type="multi_label_classification", num_labels=4), text_samples(6)
    expert = perturbed(base, 0.3, 1)
    p, q = (torch.cat([output_of(m, s).logits for s in samples]) for m in (expert, base))
    literal = literal_kl(torch.stack([p, 0 * p], -1), torch.stack([q, 0 * q], -1)).sum(1)
    found = agreement_of(base, answers_of(expert, samples))
    assert found.divergence == pytest.approx(float(literal.mean()), rel=1e-5, abs=1e-6)
    assert found.equal == sum(bool((a == b).all()) for a, b in zip(p > 0, q > 0)) / len(samples)
    assert agreement_of(expert, answers_of(expert, samples)).equal == 1


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "regression"}])
def test_values_by_the_squared_difference(settings):
    base, samples = BERT.build(**settings), text_samples(4)
    expert, near = perturbed(base, 0.3, 1), perturbed(base, 0.1, 2)
    answers = answers_of(expert, samples)
    p, q, r = (torch.cat([output_of(m, s).logits for s in samples]) for m in (expert, base, near))
    found, other = agreement_of(base, answers), agreement_of(near, answers)
    assert found.divergence == pytest.approx(float((p - q).square().sum(1).mean()), rel=1e-4, abs=1e-6)
    assert found.equal is None
    gain = 1 - float((p - r).square().sum() / (p - q).square().sum())
    assert other.score(found) == other.gain_over(found) == pytest.approx(gain, rel=1e-3)


def test_the_tokens_of_token_classifiers_and_the_ends_of_spans_count():
    samples = text_samples(5)
    base = BERT.build("BertForTokenClassification")
    expert = perturbed(base, 0.3, 1)
    p, q = (torch.cat([output_of(m, s).logits[0] for s in samples]) for m in (expert, base))
    found = agreement_of(base, answers_of(expert, samples))
    assert found.count == len(p) == sum(len(s["input_ids"]) for s in samples)
    assert found.divergence == pytest.approx(float(literal_kl(p, q).mean()), rel=1e-5, abs=1e-6)
    base = BERT.build("BertForQuestionAnswering", num_labels=2)
    expert, literal = perturbed(base, 0.3, 1), []
    for sample in samples:
        p, q = output_of(expert, sample), output_of(base, sample)
        literal += [literal_kl(getattr(p, name), getattr(q, name)) for name in ("start_logits", "end_logits")]
    found = agreement_of(base, answers_of(expert, samples))
    assert found.count == 2 * len(samples)
    assert found.divergence == pytest.approx(float(torch.cat(literal).mean()), rel=1e-5, abs=1e-6)


def test_classes_of_pixels():
    architecture = ARCHITECTURES["vit"]
    base = perturbed(segmenter(), 0.2, 0)
    expert, samples = perturbed(base, 0.2, 1), architecture.samples(0)
    p, q = (torch.cat([output_of(m, s).logits for s in samples]).movedim(1, -1) for m in (expert, base))
    found = agreement_of(base, answers_of(expert, samples))
    assert found.count == p[..., 0].numel()
    assert found.divergence == pytest.approx(float(literal_kl(p, q).mean()), rel=1e-4, abs=1e-6)


def segmenter():
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )
    return SegformerForSemanticSegmentation(config).eval()


def test_vectors_by_the_cosine():
    samples = text_samples(7)
    base = ARCHITECTURES["bert"].build()
    expert = perturbed(base, 0.2, 1)
    p, q = (torch.cat([output_of(m, s).last_hidden_state.mean(1) for s in samples]) for m in (expert, base))
    answers = answers_of(expert, samples)
    assert answers.kind == "vectors"
    found = agreement_of(base, answers)
    assert found.divergence == pytest.approx(float((1 - F.cosine_similarity(p, q)).mean()), rel=1e-4, abs=1e-6)
    assert found.equal is None
    assert found.score(found) == 0
    clip = ARCHITECTURES["clip"]
    base, samples = clip.build(), clip.samples(1)
    expert = perturbed(base, 0.2, 1)
    outputs = [(output_of(expert, s), output_of(base, s)) for s in samples]
    cosines = [F.cosine_similarity(p[name], q[name]) for p, q in outputs for name in ("text_embeds", "image_embeds")]
    found = agreement_of(base, answers_of(expert, samples))
    assert found.count == 2 * len(samples)
    assert found.divergence == pytest.approx(1 - float(torch.cat(cosines).mean()), rel=1e-4, abs=1e-6)


def test_a_model_that_answers_as_the_expert_does():
    for architecture in (LLAMA, BERT):
        expert = architecture.build()
        answers = answers_of(expert, text_samples(1), top=5)
        found = agreement_of(copy.deepcopy(expert), answers)
        assert (found.divergence, found.equal) == (0, 1)
        assert found.gain_over(found) == 0  # the base itself: nothing to gain
        worse = agreement_of(perturbed(expert, 0.1, 1), answers)
        assert worse.gain_over(found) == 0
        assert found.gain_over(worse) == 1
    # Logits of half precision are often equal; each of the best is right.
    expert = LLAMA.build().bfloat16()
    with torch.no_grad():
        expert.lm_head.weight[8:] = expert.lm_head.weight[7]
    assert agreement_of(expert, answers_of(expert, text_samples(1), top=5)).equal == 1


def test_agreement_is_measured_in_evaluation_mode_and_the_mode_is_kept():
    expert = BERT.build(hidden_dropout_prob=0.5)
    expert.train()
    expert.bert.embeddings.eval()
    answers = answers_of(expert, text_samples(1))
    assert agreement_of(expert, answers).divergence == 0
    assert expert.training
    assert not expert.bert.embeddings.training
    assert divergence(expert, answers, range(7)).item() > 0  # training may want dropout


def test_a_text_of_one_token_predicts_nothing():
    base, expert = pair(LLAMA, 1)
    samples = [{"input_ids": torch.tensor([5])}, *text_samples(1)]
    answers = answers_of(expert, samples)
    with_one, without = agreement_of(base, answers), agreement_of(base, answers, range(1, len(samples)))
    assert with_one.count == without.count == sum(len(s["input_ids"]) - 1 for s in samples)
    assert with_one.divergence == pytest.approx(without.divergence, rel=1e-5, abs=1e-6)
    nothing = agreement_of(base, answers, [0])
    assert (nothing.divergence, nothing.equal, nothing.count) == (0.0, None, 0)
    loss = divergence(base, answers, [0])
    loss.backward()
    assert loss.detach() == 0


def test_masked_tokens_are_neither_read_nor_predicted():
    base, expert = pair(LLAMA, 1)
    plain = [{"input_ids": torch.tensor([5, 9, 7, 8])}]
    masked = [{"input_ids": torch.tensor([5, 9, 7, 8, 3, 3]), "attention_mask": torch.tensor([1, 1, 1, 1, 0, 0])}]
    found, expected = (agreement_of(base, answers_of(expert, samples)) for samples in (masked, plain))
    assert found.count == expected.count == 3
    assert found.divergence == pytest.approx(expected.divergence, rel=1e-5, abs=1e-6)
    labelled = [{**plain[0], "labels": torch.tensor([-100, -100, 7, 8])}]
    assert agreement_of(base, answers_of(expert, labelled)).divergence == expected.divergence


@pytest.mark.parametrize("architecture", [LLAMA, BERT, ARCHITECTURES["bert"]])
def test_answers_come_back_from_their_file(architecture, tmp_path):
    base, expert = pair(architecture, 1)
    samples = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in text_samples(1)]
    answers = answers_of(expert, samples, top=9)
    path = answers.save(tmp_path / "new" / "answers.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["answers.safetensors"]
    loaded = ExpertAnswers.load(str(path), [dict(reversed(s.items())) for s in samples])
    assert loaded.kind == answers.kind
    for one, other in zip(loaded.answers, answers.answers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert figures(agreement_of(base, loaded)) == figures(agreement_of(base, answers))


def test_files_that_do_not_fit_are_refused(tmp_path):
    samples = text_samples(1)
    path = answers_of(LLAMA.build(), samples, top=3).save(tmp_path / "answers.safetensors")
    whole, tensors = path.read_bytes(), load_file(path)
    changed = [*samples[:-1], {"input_ids": samples[-1]["input_ids"].flip(0)}]
    for others in (samples[:-1], samples[::-1], changed, []):
        with pytest.raises(HfEsmError, match=re.escape(str(path)) + ": answers on other samples"):
            ExpertAnswers.load(path, others)
    path.write_bytes(whole[:-9])
    with pytest.raises(DamagedFileError, match=re.escape(str(path))):
        ExpertAnswers.load(path, samples)
    with pytest.raises(DamagedFileError, match=r"none\.safetensors"):
        ExpertAnswers.load(tmp_path / "none.safetensors", samples)
    for metadata, message in (({"format": "pt"}, "no expert's answers"), ({"version": "99"}, "format version 99")):
        save_file(tensors, path, metadata_of(whole) | metadata)
        with pytest.raises(HfEsmError, match=message):
            ExpertAnswers.load(path, samples)
    name = "2.log_probabilities"
    for broken in (tensors[name][:-1], tensors[name] * torch.nan, None):
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest if broken is None else {**rest, name: broken}, path, metadata_of(whole))
        with pytest.raises(DamagedFileError, match="answers are damaged"):
            ExpertAnswers.load(path, samples)


def metadata_of(file):
    return json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]


def test_a_peft_model_is_read_as_the_model_inside():
    base, expert = pair(LLAMA, 1)
    samples = text_samples(1)
    answers = answers_of(expert, samples)
    expected = agreement_of(base, answers)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
    assert agreement_of(adapted, answers).divergence == pytest.approx(expected.divergence, rel=1e-5, abs=1e-6)
    masked = ARCHITECTURES["roberta"].build()
    of_tokens = answers_of(get_peft_model(masked, LoraConfig(r=2, target_modules=["query"])), samples)
    assert of_tokens.kind == "tokens"
    assert agreement_of(masked, of_tokens).count == sum(len(s["input_ids"]) for s in samples)
    divergence(adapted, answers, [0, 1]).backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@seeds
@pytest.mark.parametrize(("listed", "size"), [(4, 12), (9, 12), (9, 9), (9, 7), (4, 7)])
def test_answers_in_another_vocabulary_are_the_same_distribution(seed, listed, size):
    """Against the full distribution in float64: tokens that are not there count among the others."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 9, generator=generator)
    full = logits.double().softmax(1)
    ids = torch.full((9,), -1)
    there = torch.randperm(9, generator=generator)[: min(size, 7)]
    ids[there] = torch.randperm(size, generator=generator)[: len(there)]
    best = logits.topk(listed).indices
    answer = {"ids": best.int(), "log_probabilities": lumped_log_probabilities(logits, best)}
    found = in_vocabulary(answer, ids, size)
    new, probabilities = found["ids"].long(), found["log_probabilities"].double().exp()
    assert all(len(set(row.tolist())) == new.shape[1] for row in new) and new.min() >= 0 and new.max() < size
    expected = torch.zeros(5, size, dtype=torch.float64)
    for row in range(5):
        for token in best[row].tolist():
            if ids[token] >= 0:
                expected[row, ids[token]] = full[row, token]
    if listed >= size:
        expected /= expected.sum(1, keepdim=True)
        assert probabilities.shape[1] == size
    else:
        assert torch.allclose(probabilities[:, -1], 1 - expected.sum(1), atol=1e-6)
    assert torch.allclose(probabilities[:, : new.shape[1]], expected.gather(1, new), atol=1e-6)
    assert (probabilities[:, : new.shape[1]].diff(dim=1) <= 1e-9).all()  # the best first


@seeds
@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_a_score_on_draws_is_that_of_the_drawn_samples(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 5, (6,), generator=generator).double()
    divergences, at_base = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    equals = (counts * torch.rand(6, dtype=torch.float64, generator=generator)).floor()
    model, base = Agreement(kind, divergences, equals, counts), Agreement(kind, at_base, equals, counts)
    draws = torch.randint(6, (9, 4), generator=generator)
    found = model.scores_of_draws(base, draws).tolist()
    for draw, score in zip(draws.tolist(), found, strict=True):
        drawn = [sum(float(values[i]) for i in draw) for values in (divergences, at_base, equals, counts)]
        assert score == pytest.approx(drawn[2] / drawn[3] if kind == "classes" else 1 - drawn[0] / drawn[1])
    assert model.scores_of_draws(base, torch.arange(6)[None]).tolist() == pytest.approx([model.score(base)])
    nothing = Agreement("tokens", torch.zeros(2).double(), None, torch.zeros(2).double())
    assert nothing.scores_of_draws(nothing, torch.tensor([[0, 1]])).tolist() == [0.0]
