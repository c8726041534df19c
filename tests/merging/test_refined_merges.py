"""Refined merges as users call them: of LoRA experts, in half precision, of classifiers, and interrupted."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from hf_esm import HfEsmError, MergeResult, calibrate, load_task_model, merge_models
from hf_esm.checkpoints import REFINED_FOLDER
from hf_esm.data import sample_fingerprint
from hf_esm.merging.refining import refine
from hf_esm.metrics import Agreement, ExpertAnswers, agreement_of
from hf_esm.tuners.essential import EssentialComponentsConfig
from support.helpers import perturbed, save
from support.problems import relative_error
from support.refining_toys import TASKS, samples_of
from support.tiny import LLAMA
from support.toys import base_model, classifier, weights


merge = partial(merge_models, progress=False)
SEEN = 8  # samples of the statistics
FEW = {"components": 4, "steps": 30, "batch_size": 2}


@dataclass(frozen=True)
class Merges:
    """One merge without refining, refined, and refined with the gates kept as an adapter.

    Attributes:
        kind: key of `KINDS`.
        folder: of the base, the experts by task, and `plain`, `folded` and `kept`.
        folded: result of the refined merge.
        kept: result of the merge whose adapter is kept; its weights are float32.
        learn: experts' answers that gates learned from, by task.
        held_back: other answers, which refining stopped by.
        base_divergence: of the base from the experts.
    """

    kind: str
    folder: Path
    folded: MergeResult
    kept: MergeResult
    learn: dict[str, ExpertAnswers]
    held_back: dict[str, ExpertAnswers]
    base_divergence: dict[str, float]

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        return weights(self.folder / name)

    def adapter(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of the kept adapter by the name of the weight, and `E`, `C` or `gates`."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(self.folder / "kept" / REFINED_FOLDER / "adapter_model.safetensors").items():
            module, _, part = key.removeprefix("base_model.model.").rpartition(".essential_components_")
            found.setdefault(f"{module}.weight", {})[part] = tensor
        return found

    def agreement(self, name: str, task: str) -> Agreement:
        """Agreement of a written model with an expert on the samples that are held back."""
        return agreement_of(load_task_model(self.folder / name, task), self.held_back[task])

    def loss(self, name: str) -> float:
        parts = [self.agreement(name, task).divergence / self.base_divergence[task] for task in TASKS]
        return sum(parts) / len(parts)

    def scores(self, name: str) -> list[float]:
        """What the written model is judged by, by task; a classifier's score is the same whatever the base answers."""
        found = []
        for task in TASKS:
            model = load_task_model(self.folder / "plain", task)
            model.load_state_dict(self.stored("base"), strict=False)
            found.append(self.agreement(name, task).score(agreement_of(model, self.held_back[task])))
        return found


def write_half(folder):
    """A language model and experts in bfloat16."""
    base = LLAMA.build()
    for name, model in {"base": base, "law": perturbed(base, 0.1, 1), "code": perturbed(base, 0.1, 2)}.items():
        save(model.bfloat16(), folder / name)


LORA = {"law": (2, ("q_proj", "down_proj")), "code": (3, ("q_proj", "o_proj"))}  # rank and maps
LORA_ALPHA = 8


def write_lora(folder):
    """A language model and two adapters on it, of other maps and ranks."""
    base = LLAMA.build()
    save(base, folder / "base")
    for task, (rank, maps) in LORA.items():
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, target_modules=list(maps))
        model = get_peft_model(type(base).from_pretrained(folder / "base"), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.6)
        model.save_pretrained(folder / task)


def write_classifiers(folder):
    """A body, and classifiers with heads of 2 and 3 labels."""
    base = base_model()
    save(base, folder / "base")
    for seed, (task, labels) in enumerate(zip(TASKS, "ab")):
        save(perturbed(classifier(base, labels), 0.1, seed), folder / task)


KINDS = {
    "half": (write_half, "regmean", FEW),
    "lora": (write_lora, "regmean", FEW),
    "classifiers": (write_classifiers, "esm", True),
}


@pytest.fixture(scope="module", params=KINDS)
def merges(request, tmp_path_factory):
    write, method, refining = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write(folder)
    experts, calibration, seen = {task: folder / task for task in TASKS}, {}, {}
    for task, expert in experts.items():
        rows = samples_of(task, 3, 32)
        statistics = calibrate(expert, rows[:SEEN], base=folder / "base", progress=False)
        calibration[task] = {"statistics": statistics, "samples": rows}
    run = partial(merge, folder / "base", experts, calibration=calibration, method=method)
    run(output_dir=folder / "plain", refine=False)

    def watched(models, factors, learn, held_back, base_divergence, *args, **options):
        seen.update(learn=learn, held_back=held_back, base_divergence=base_divergence)
        return refine(models, factors, learn, held_back, base_divergence, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_esm.merging.refined.refine", watched)
        folded = run(output_dir=folder / "folded", refine=refining)
    keeping = {**({} if refining is True else refining), "keep_adapter": True}
    kept = run(output_dir=folder / "kept", refine=keeping, dtype="float32")
    return Merges(request.param, folder, folded, kept, **seen)


@pytest.mark.cases(2)
def test_gates_bring_the_model_nearer_to_the_experts_on_samples_that_they_did_not_learn_from(merges):
    for task in TASKS:
        parts = (samples_of(task, 3, 32)[:SEEN], merges.learn[task].samples, merges.held_back[task].samples)
        learned, *prints = [{sample_fingerprint(sample) for sample in part} for part in parts]
        assert [len(part) for part in prints] == [18, 6]
        assert not learned & prints[0] and not learned & prints[1] and not prints[0] & prints[1]
    before, after = merges.loss("plain"), merges.loss("folded")
    assert after < 0.9 * before
    rounding = 0.02 if merges.kind == "half" else 1e-4  # of weights, which gates are no longer apart from
    assert merges.folded.refined[0] == pytest.approx(before, rel=1e-3 if merges.kind == "half" else 1e-4)
    assert min(merges.folded.refined.values()) == pytest.approx(after, rel=rounding)
    scores = merges.scores("folded")
    assert sum(scores) >= sum(merges.scores("plain"))
    assert [merges.folded.agreement[task].merged for task in TASKS] == pytest.approx(scores, abs=1e-4)
    assert merges.kept.agreement == merges.folded.agreement


def test_written_weights_are_the_merged_weights_and_the_gates(merges):
    """Literally, in float64, from the adapter that was kept."""
    plain, folded, kept = (merges.stored(name) for name in ("plain", "folded", "kept"))
    assert plain.keys() == folded.keys() == kept.keys()
    gated, changed = merges.adapter(), 0
    for name, weight in kept.items():
        written = folded[name]
        if name in gated:
            e, c, gates = (gated[name][part].double() for part in ("E", "C", "gates"))
            expected = weight.double() + (e * gates) @ c
            changed += not torch.equal(expected.to(weight.dtype), weight)
            atol, rtol = (0, 2**-8) if merges.kind == "half" else (1e-6, 0)
            torch.testing.assert_close(written.double(), expected, atol=atol, rtol=rtol)
        else:
            assert torch.equal(written, weight.to(written.dtype)), name
        if "embed" not in name:  # of embeddings, coefficients are folded in both
            assert torch.equal(plain[name], weight.to(plain[name].dtype)), name
    assert changed == len(gated) > 5
    assert merges.kept.refined == merges.folded.refined


@pytest.mark.parametrize("merges", ["half"], indirect=True)
def test_gates_of_a_model_of_half_precision_are_float32(merges):
    assert {weight.dtype for weight in merges.stored("folded").values()} == {torch.bfloat16}
    assert {tensor.dtype for part in merges.adapter().values() for tensor in part.values()} == {torch.float32}


@pytest.mark.parametrize("merges", ["lora"], indirect=True)
def test_lora_experts_give_components_of_their_own_rank(merges):
    """Which are their whole updates."""
    config = EssentialComponentsConfig.from_pretrained(merges.folder / "kept" / REFINED_FOLDER)
    stored = {task: load_file(merges.folder / task / "adapter_model.safetensors") for task in TASKS}
    for name, part in merges.adapter().items():
        module = name.removesuffix(".weight")
        ranks = [rank if module.endswith(maps) else 0 for rank, maps in LORA.values()]
        assert list(config.task_ranks_of(module).values()) == ranks
        for task, rank, e, c in zip(TASKS, ranks, part["E"].split(ranks, 1), part["C"].split(ranks)):
            if rank:
                a, b = (stored[task][f"base_model.model.{module}.lora_{kind}.weight"].double() for kind in "AB")
                assert relative_error(e.double() @ c.double(), LORA_ALPHA / rank * b @ a) < 1e-5


@pytest.mark.parametrize("merges", ["classifiers"], indirect=True)
def test_refined_classifiers_keep_their_heads(merges):
    for task, count in zip(TASKS, (2, 3)):
        expert = BertForSequenceClassification.from_pretrained(merges.folder / task)
        found = load_task_model(merges.folder / "folded", task)
        assert found.classifier.weight.shape[0] == count
        assert all(torch.equal(*pair) for pair in zip(found.classifier.parameters(), expert.classifier.parameters()))
    assert merges.folded.refined[0] == pytest.approx(merges.loss("plain"), rel=1e-4)


class Stopped(Exception):
    pass


STOPS = {  # the stage and what is done when it stops, and the parts of stages that are left to do
    "asking": ("Asking experts", 1, {"Asking experts": 1, "Merging by esm": 21, "Decomposing": 15, "Refining": 31}),
    "refining": ("Refining", 28, {"Refining": 11}),
    "writing": ("Writing", 5, {"Refining": 11}),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize(("stage", "count", "left"), STOPS.values(), ids=STOPS)
def test_an_interrupted_refining_merge_goes_on_to_the_same_bits(tmp_path, stage, count, left):
    base = LLAMA.build()
    save(base, tmp_path / "base")
    for seed, task in enumerate(TASKS):
        save(perturbed(base, 0.1, seed), tmp_path / task)
    experts = {task: tmp_path / task for task in TASKS}
    calibration = {task: samples_of(task, 3, 24) for task in TASKS}
    run = partial(merge, tmp_path / "base", experts, calibration=calibration, refine=FEW)
    whole = run(output_dir=tmp_path / "whole")
    assert whole.chosen_by == "agreement" and whole.refined

    def stop(*call):
        if call[:2] == (stage, count):
            raise Stopped

    resumable = partial(run, output_dir=tmp_path / "again", resume_dir=tmp_path / "work")
    with pytest.raises(Stopped):
        resumable(callback=stop)
    assert not (tmp_path / "again").exists()
    with pytest.raises(HfEsmError, match="differs in `refine`"):
        resumable(refine={**FEW, "learning_rate": 0.1})
    calls = {}
    again = resumable(callback=lambda title, done, total: calls.update({title: total}))
    assert {title: total for title, total in calls.items() if title in STOPS["asking"][2]} == left
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert (again.choice, again.alpha, again.refined) == (whole.choice, whole.alpha, whole.refined)
    assert again.agreement == whole.agreement
    assert not (tmp_path / "work").exists()
