"""Routed experts in models with two towers, which compare texts with images: each tower decides for its samples."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AlignConfig, AlignModel

from hf_esm import HfEsmError, RoutedModel, calibrate, merge_models
from hf_esm.architecture import tower_of, towers
from hf_esm.tuners.routed.model import decide, recording, route
from support.architectures import ARCHITECTURES, CLIP, ENCODER, captioned_images, image_samples
from support.helpers import Architecture, Samples
from support.routed import ROUTERS, TASKS, chosen, padded, rebuilt, recorded, save_adapter, shares, task_samples
from support.routed_toys import tuned


pytestmark = pytest.mark.slow


# With projections behind each tower, without, and behind both at once.
NAMES = ["clip", "siglip", "dual-encoder"]
TEXT, VISION = "text_model", "vision_model"

names = pytest.mark.parametrize("name", NAMES)
routers = pytest.mark.parametrize("router", ROUTERS)
Load = Callable[[str, str], PeftModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a tiny model with an adapter of one kind of router; always the same model."""
    made: dict[tuple[str, str], PeftModel] = {}

    def build(name: str, router: str) -> PeftModel:
        if (name, router) not in made:
            base = rebuilt(ARCHITECTURES[name])
            folder = tmp_path_factory.mktemp("towers") / "adapter"
            save_adapter(base, ARCHITECTURES[name], folder, router)
            made[name, router] = PeftModel.from_pretrained(base, folder).eval()
        return made[name, router]

    return build


def texts_of(name: str, tasks: list[str], equal: bool = True) -> Samples:
    """Texts of one length, unless not `equal`."""
    found = [task_samples(ARCHITECTURES[name], task, 3)[i] for i, task in enumerate(tasks)]
    length = min(len(sample["input_ids"]) for sample in found)
    return [{"input_ids": sample["input_ids"][: length if equal else None]} for sample in found]


def pictures_of(name: str, tasks: list[str]) -> Samples:
    found = [task_samples(ARCHITECTURES[name], task, 3)[i] for i, task in enumerate(tasks)]
    return [{"pixel_values": sample["pixel_values"]} for sample in found]


def test_towers_are_told_by_what_a_model_is_made_of():
    found = {name: towers(ARCHITECTURES[name].build()) for name in (*NAMES, "bert", "clip-vision", "llava", "whisper")}
    assert found == dict.fromkeys(NAMES, (TEXT, VISION)) | dict.fromkeys(
        ("bert", "clip-vision", "llava", "whisper"), ()
    )
    told = {"text_projection": TEXT, "visual_projection": VISION, "vision_model.head": VISION, "text_model.head": TEXT}
    assert {module: tower_of(module, found["clip"]) for module in told} == told
    assert tower_of("text_projection", ()) == ""
    clip = ARCHITECTURES["clip"].build()
    clip.fusion = nn.Linear(2, 2)  # which may read both
    assert towers(clip) == ()


@pytest.mark.cases(3)
@routers
@names
@torch.no_grad()
def test_pictures_and_texts_get_what_they_get_alone(load, name, router):
    """Neither their numbers, nor the other samples, nor the way of calling the model change their routes."""
    model = load(name, router)
    # SigLIP and this dual encoder's texts: what is read last, padding or not, is what counts in the static model, too.
    texts = texts_of(name, [TASKS[2], TASKS[0], TASKS[0], TASKS[1], TASKS[2]], equal=name != "clip")
    pictures = pictures_of(name, TASKS)
    output, decisions = recorded(model, **padded(model, texts), **padded(model, pictures))
    with route(model, "static"):
        static, none = recorded(model, **padded(model, texts), **padded(model, pictures))
    assert not none
    routes = chosen(decisions)
    for tower, samples, embeds in ((TEXT, texts, "text_embeds"), (VISION, pictures, "image_embeds")):
        found = output[embeds]
        assert (found - static[embeds]).abs().max() > 1e-2
        own_modules = {key for key in routes if tower_of(key[1], towers(model.get_base_model())) == tower}
        assert own_modules and any(len(set(routes[key])) > 1 for key in own_modules)
        features = model.get_text_features if tower == TEXT else model.get_image_features
        for i, sample in enumerate(samples):
            with recording(model) as records:
                alone = features(**padded(model, [sample])).pooler_output
            expected = torch.nn.functional.normalize(alone, dim=-1)
            torch.testing.assert_close(found[i], expected[0], rtol=1e-5, atol=1e-5)
            assert {(a, m) for a, m, _ in records} == own_modules
            for adapter, module, decision in records:
                assert int(decision.route.experts.reshape(-1)[0]) == routes[adapter, module][i]
    if router == "discriminant":
        assert {key[1].partition(".")[0] for key in routes} == {TEXT, VISION}


@names
@torch.no_grad()
def test_projections_get_the_experts_of_their_own_tower(load, name):
    """If there are as many images as texts, only the place of a module tells whose samples it reads."""
    model = load(name, "discriminant")
    texts, pictures = texts_of(name, [TASKS[1]] * 2), pictures_of(name, [TASKS[0]] * 2)
    batch = padded(model, texts) | padded(model, pictures)
    base, seen = model.get_base_model(), {}
    handles = [
        getattr(base, module).register_forward_hook(lambda m, args, out, at=module: seen.update({at: (args[0], out)}))
        for module in ("text_projection", "visual_projection")
        if hasattr(base, module)
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == (0 if name == "siglip" else 2)
    for at, (read, found) in seen.items():
        own = TEXT if at == "text_projection" else VISION
        (decision,) = (d for _, module, d in decide(model, batch) if module.startswith(own))
        by_task = []
        for task in ("static", *TASKS):
            with route(model, task):
                by_task.append(getattr(base, at)(read))
        static, *added = by_task
        assert decision.probabilities.argmax(-1).tolist() == [1 if own == TEXT else 0] * 2
        expected = static.clone()
        for row, given in enumerate(shares(decision.route)):
            for expert, weight in given.items():
                expected[row] += weight * (added[expert] - static)[row]
        assert (expected - static).abs().max() > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@routers
@torch.no_grad()
def test_what_decides_is_run_alone_and_what_is_not_given_not_at_all(load, router):
    model = load("clip", router)
    texts, pictures = texts_of("clip", TASKS, equal=False), pictures_of("clip", TASKS)
    _, whole = recorded(model, **padded(model, texts), **padded(model, pictures))
    for samples, parts in ((texts, {TEXT}), (pictures, {VISION}), ([*map(lambda t, p: t | p, texts, pictures)], None)):
        found = {(adapter, module): decision for adapter, module, decision in decide(model, padded(model, samples))}
        expected = {key: d for key, d in whole.items() if parts is None or tower_of(key[1], (TEXT, VISION)) in parts}
        assert chosen(found) == chosen(expected)


def test_a_mask_alone_is_nothing_to_read(load, monkeypatch):
    """The mask would also fit the other tower."""
    model = load("clip", "discriminant")

    def get_image_features(pixel_values, attention_mask=None):
        raise AssertionError

    monkeypatch.setattr(model.get_base_model(), "get_image_features", get_image_features)
    batch = padded(model, texts_of("clip", TASKS))
    assert "attention_mask" in batch and len(decide(model, batch)) == 1


@pytest.mark.cases(1)
@names
def test_a_compiled_model_gives_the_same(load, name):
    model = load(name, "discriminant")
    batch = padded(model, texts_of(name, TASKS)) | padded(model, pictures_of(name, TASKS[1:]))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_trains_the_same(load):
    """Gradients are compared for each tower alone, and for the whole model."""
    model = copy.deepcopy(load("clip", "discriminant")).train()
    model.requires_grad_(True)
    texts, pictures = padded(model, texts_of("clip", TASKS)), padded(model, pictures_of("clip", TASKS))

    def gradients() -> list[dict[str, Tensor]]:
        found = []
        for run in (
            lambda: model.get_text_features(**texts).pooler_output,
            lambda: model.get_image_features(**pictures).pooler_output,
            lambda: model(**texts, **pictures)[0],
        ):
            model.zero_grad()
            run().square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return found

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for found, wanted in zip(gradients(), expected, strict=True):
        assert found.keys() == wanted.keys() and any("routed_experts_A" in name for name in found)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_copy_routes_the_same(load):
    model = load("clip", "discriminant")
    batch = padded(model, texts_of("clip", TASKS)) | padded(model, pictures_of("clip", TASKS))
    model(**batch)  # what a pass leaves behind is not copied
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(**batch)[0], model(**batch)[0])


def test_a_projection_by_itself_has_no_route(load):
    model = copy.deepcopy(load("clip", "discriminant"))
    with pytest.raises(HfEsmError, match="visual_projection was run outside of its model's forward pass"):
        model.get_base_model().visual_projection(torch.randn(2, 32))


# ---- from a merge on


def task_rows(task: str, seed: int = 0) -> Samples:
    return [
        row for k in (0, 1, 2) for row in task_samples(ARCHITECTURES["clip"], TASKS["abc".index(task)], 3 * seed + k)
    ]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    base = rebuilt(ARCHITECTURES["clip"])
    calibration = {task: task_rows(task) for task in "ab"}
    experts = {"a": tuned(base, 1), "b": tuned(base, 2)}

    def merge(**method: Any) -> RoutedModel:
        out = folder / "-".join(["out", *map(str, method.values())])
        if not out.exists():
            settings = {"name": "esm++", "rank": 4, **method}
            merge_models(base, experts, calibration=calibration, method=settings, output_dir=out, progress=False)
        return RoutedModel.from_pretrained(out)

    merge.base = base
    return merge


@pytest.mark.parametrize("settings", [{}, {"router_features": "base"}, {"router": "prototype"}], ids=str)
@torch.no_grad()
def test_a_merged_model_finds_tasks_of_pictures_and_of_texts(merged, settings):
    routed = merged(**settings)
    rows = [*task_rows("a", 1)[:3], *task_rows("b", 1)[:3]]
    for inputs in (
        rows,
        [{"input_ids": r["input_ids"]} for r in rows],
        [{"pixel_values": r["pixel_values"]} for r in rows],
    ):
        found = routed.explain(inputs)
        assert [said.likeliest for said in found] == list("aaabbb")
        towers_read = {module.partition(".")[0] for said in found for module in said.layers}
        assert {TEXT, VISION} >= towers_read & {TEXT, VISION} and len(towers_read & {TEXT, VISION}) == len(inputs[0])
        for said in found:
            assert sum(said.probabilities.values()) == pytest.approx(1)
            assert sum(said.weights.values()) <= 1 + 1e-6
    batch = padded(routed.model, rows)
    output = routed(**batch)
    for i, row in enumerate(rows):
        alone = routed(**{name: value[None] for name, value in row.items()})
        torch.testing.assert_close(output.text_embeds[i], alone.text_embeds[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.image_embeds[i], alone.image_embeds[0], rtol=1e-5, atol=1e-5)


def test_an_explanation_of_two_decisions_is_their_mean(merged):
    routed = merged()
    (a, b) = task_rows("a", 1)[0], task_rows("b", 1)[0]
    text, picture = {"input_ids": a["input_ids"]}, {"pixel_values": b["pixel_values"]}
    (one,), (other,) = routed.explain([text]), routed.explain([picture])
    (both,) = routed.explain([text | picture])
    assert list(one.layers.values()) == ["a"] and list(other.layers.values()) == ["b"]
    assert both.layers == one.layers | other.layers
    for task in "ab":
        assert both.probabilities[task] == pytest.approx((one.probabilities[task] + other.probabilities[task]) / 2)
        mean = (one.weights.get(task, 0) + other.weights.get(task, 0)) / 2
        assert both.weights.get(task, 0) == pytest.approx(mean)
    assert both.distance == max(one.distance, other.distance)
    assert one.sure and other.sure and both.sure
    foreign = {"pixel_values": 50 * torch.randn(3, 16, 16)}
    (none,), (half,) = routed.explain([foreign]), routed.explain([foreign | text])
    assert (none.task, none.sure) == (half.task, half.sure) == ("none", False)
    assert half.weights == {"a": one.weights["a"] / 2}


@torch.no_grad()
def test_given_tasks_are_those_of_each_tower_s_samples(merged, tmp_path):
    """One task for all samples, or one per sample if there are as many texts as images; as with LoRA adapters."""
    routed = merged()
    adapters = routed.export_lora(tmp_path / "lora")
    samples = captioned_images(0)
    batch = padded(routed.model, samples[:3])
    fewer = {name: value[:1] if name == "pixel_values" else value for name, value in batch.items()}
    expected = {}
    for task in "ab":
        base = copy.deepcopy(routed.model.get_base_model())
        static = type(base).from_pretrained(routed.folder)
        expected[task] = PeftModel.from_pretrained(static, str(adapters[task])).eval()
        with routed.route(task):
            torch.testing.assert_close(routed(**fewer)[0], expected[task](**fewer)[0], rtol=1e-5, atol=1e-5)
    with routed.route(["a", "b", "a"]):
        found = routed(**batch)
    for i, task in enumerate("aba"):
        own = expected[task](**batch)
        torch.testing.assert_close(found.image_embeds[i], own.image_embeds[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.text_embeds[i], own.text_embeds[i], rtol=1e-5, atol=1e-5)
    with pytest.raises(HfEsmError, match="Routes of 3 samples do not fit a batch of 1"), routed.route(["a", "b", "a"]):
        routed(**fewer)


def test_labels_are_not_to_be_had(merged):
    """The card does not promise labels either."""
    card = (merged().folder / "README.md").read_text()
    assert "model(**inputs)  # with the experts that the router chooses" in card and "predict" not in card
    with pytest.raises(HfEsmError, match="A CLIPModel compares its inputs, and has no class per sample"):
        merged().predict(task_rows("a")[:2])


def test_experts_come_and_go(merged, tmp_path):
    routed = merged(router_features="base")
    expert = tuned(merged.base, 3)
    statistics = calibrate(expert, task_rows("c"), base=merged.base, progress=False)
    more = routed.add_expert("c", expert, statistics, output_dir=tmp_path / "more", base=merged.base)
    rows = [row for task in "abc" for row in task_rows(task, 1)[:2]]
    assert [said.likeliest for said in more.explain(rows)] == list("aabbcc")
    less = more.remove_expert("a", output_dir=tmp_path / "less")
    assert [said.likeliest for said in less.explain(rows[2:])] == list("bbcc")


@torch.no_grad()
def test_a_tower_of_convolutions_has_nothing_to_route(tmp_path):
    """Image features are those of the static model; the texts have experts."""
    vision = {
        "hidden_dim": 24,
        "image_size": 16,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 8],
        "out_channels": [8, 24],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    }
    config = AlignConfig(text_config=ENCODER, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    base = AlignModel(config).eval()
    assert towers(base) == (TEXT, VISION)
    rows = {task: task_rows(task) for task in "ab"}
    experts = {"a": tuned(base, 1), "b": tuned(base, 2)}
    settings = {"name": "esm++", "rank": 4}
    merge_models(base, experts, calibration=rows, method=settings, output_dir=tmp_path / "out", progress=False)
    routed = RoutedModel.from_pretrained(tmp_path / "out")
    assert routed.config.towers.keys() == {TEXT}
    batch = padded(routed.model, rows["a"][:2])
    output = routed(**batch)
    with routed.route("static"):
        static = routed(**batch)
    assert torch.equal(output.image_embeds, static.image_embeds)
    assert not torch.allclose(output.text_embeds, static.text_embeds, atol=1e-3)
    assert [said.likeliest for said in routed.explain(rows["a"][:2])] == ["a", "a"]
    with pytest.raises(HfEsmError, match="the router does not read pixel_values"):
        routed.explain([{"pixel_values": rows["a"][0]["pixel_values"]}])


@routers
@torch.no_grad()
def test_an_image_classifier_made_of_one_tower_is_routed_by_sample(router, tmp_path):
    """Its config names a text tower, too, which it has not."""
    architecture = Architecture("CLIPForImageClassification", CLIP, image_samples)
    base = rebuilt(architecture)
    save_adapter(base, architecture, tmp_path / "adapter", router)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    images = torch.stack([task_samples(architecture, task, 3)[0]["pixel_values"] for task in TASKS])
    together = model(pixel_values=images).logits
    for image, expected in zip(images, together, strict=True):
        torch.testing.assert_close(model(pixel_values=image[None]).logits[0], expected, rtol=1e-4, atol=1e-5)
    with route(model, "static"):
        assert not torch.allclose(model(pixel_values=images).logits, together, atol=1e-4)
