"""What messages tell the user to call, executed, with the right outcome. A last test lists every such message.

Remedies of one kind of file are tested beside that kind, see `tests/checkpoints/test_adapter_files.py`.
"""

import ast
import copy
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import Tensor

import hf_esm
from hf_esm import HfEsmError, RoutedModel, essential_components, load_task_model, merge_models
from hf_esm.checkpoints import Checkpoint, open_checkpoint, resolve_source
from support.embedders import write_embedder
from support.helpers import perturbed, save, stored_tensors, text_samples, train
from support.problems import relative_error
from support.routed_toys import merge_bert
from support.tiny import BERT, GPT2, LLAMA, SENTENCES
from support.vocabularies import row_of, write


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # PEFT, of its own types

SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(Path(hf_esm.__file__).parent.rglob("*.py"))}
TESTS = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save(LLAMA.build(), tmp_path_factory.mktemp("remedies") / "base")


def language_model(base: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base)


def opened(expert: Any, base: str) -> Checkpoint:
    return open_checkpoint(resolve_source(expert, "expert"), open_checkpoint(resolve_source(base, "base")))


def refusal(expert: Any, base: str) -> str:
    with pytest.raises(HfEsmError) as caught:
        opened(expert, base)
    return str(caught.value)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=text_samples(3)[1]["input_ids"][None]).logits


def adapted(base: str, *, config: type = LoraConfig, **settings: Any) -> PeftModel:
    rank = {"r": 4} if config is LoraConfig else {}
    return train(language_model(base), config(task_type="CAUSAL_LM", target_modules=["q_proj"], **rank, **settings))


UNLOADED = {
    "KaSA": lambda base: adapted(base, kasa_config=peft.tuners.lora.config.KasaConfig()),
    "FRoD": lambda base: adapted(
        base, config=next(c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == "FROD")
    ),
}


@pytest.mark.parametrize("make", UNLOADED.values(), ids=UNLOADED)
def test_an_adapter_that_changes_the_base_is_unloaded_and_merged_as_a_full_model(make, base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path / "adapter")
    message = refusal(tmp_path / "adapter", base)
    assert "`merge_and_unload()` on the loaded model, save that" in message and "Was it trained" not in message
    loaded = PeftModel.from_pretrained(language_model(base), tmp_path / "adapter")
    folder = save(loaded.merge_and_unload(), tmp_path / "unloaded")
    assert relative_error(logits(opened(folder, base).load_model()), logits(model)) < 1e-5


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_converted(initialisation, base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=initialisation)
    model = get_peft_model(language_model(base), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = initialisation
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    model.save_pretrained(tmp_path / "trained")
    assert "`model.save_pretrained(folder, path_initial_model_for_weight_conversion=before)`" in refusal(
        tmp_path / "trained", base
    )
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    assert relative_error(logits(opened(tmp_path / "converted", base).load_model()), expected) < 1e-5


def test_rows_that_the_base_lacks_are_saved_with_the_adapter(base, tmp_path):
    model = language_model(base)
    model.resize_token_embeddings(62, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[61])
    model = train(model, config)
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert "`save_pretrained(…, save_embedding_layers=True)`" in refusal(tmp_path / "without", base)
    model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    assert relative_error(logits(opened(tmp_path / "with", base).load_model()), logits(model)) < 1e-5


@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {"layer_replication": [[0, 2], [1, 2]]}], ids=lambda s: next(iter(s))
)
def test_what_peft_cannot_unload_either_is_left_out(settings, base, tmp_path):
    adapted(base, **settings).save_pretrained(tmp_path / "adapter")
    assert "Leave it out, or merge a LoRA adapter" in refusal(tmp_path / "adapter", base)
    loaded = PeftModel.from_pretrained(language_model(base), tmp_path / "adapter")
    with pytest.raises(RuntimeError):
        loaded.merge_and_unload().save_pretrained(tmp_path / "unloaded")


def test_a_tied_expert_is_saved_untied_over_a_base_with_a_head_of_its_own(tmp_path):
    base = GPT2.build("GPT2LMHeadModel", tie_word_embeddings=False)
    save(base, tmp_path / "base")
    tied = GPT2.build("GPT2LMHeadModel")
    tied.transformer.load_state_dict(perturbed(base, 0.05, 1).transformer.state_dict())
    arguments = {"method": "mean", "progress": False}
    result = merge_models(tmp_path / "base", {"x": save(tied, tmp_path / "tied")}, dry_run=True, **arguments)
    (warning,) = [text for text in result.warnings if "is tied to its embeddings" in text]
    assert "`model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())`" in warning
    model = copy.deepcopy(tied)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    untied = save(model, tmp_path / "untied")
    result = merge_models(tmp_path / "base", {"x": untied}, output_dir=tmp_path / "out", **arguments)
    assert not result.warnings and result.plan.heads.by_task == {"x": []}
    assert relative_error(logits(language_model(str(tmp_path / "out"))), logits(tied)) < 1e-5


def test_components_for_several_adapters_in_a_batch_are_written_as_lora(tmp_path):
    base = BERT.build("BertForSequenceClassification")
    folders = {task: save(perturbed(base, 0.1, i), tmp_path / task) for i, task in enumerate(("base", "a", "b"))}
    for task in "ab":
        for as_lora in (True, False):
            output = tmp_path / f"{task}-{as_lora}"
            samples = text_samples(1)
            essential_components(
                folders["base"], folders[task], samples, rank=4, as_lora=as_lora, output_dir=output, progress=False
            )
    rows, answers = torch.stack([sample["input_ids"][:3] for sample in text_samples(2)[:2]]), []
    for as_lora in (True, False):
        model = transformers.BertForSequenceClassification.from_pretrained(folders["base"])
        model = PeftModel.from_pretrained(model, tmp_path / f"a-{as_lora}", "a").eval()
        model.load_adapter(tmp_path / f"b-{as_lora}", "b")
        if not as_lora:
            with pytest.raises((HfEsmError, ValueError), match=r"`essential_components\(…, as_lora=True\)`"):
                model(input_ids=rows, adapter_names=["a", "b"])
            for i, task in enumerate("ab"):
                model.set_adapter(task)
                answers.append(model(input_ids=rows).logits[i])
        else:
            found = model(input_ids=rows, adapter_names=["a", "b"]).logits
    assert relative_error(found, torch.stack(answers)) < 1e-4


def test_code_that_comes_with_a_model_runs_where_it_is_trusted(tmp_path):
    code = "import transformers\n\n\nclass Own(transformers.BertModel):\n    pass\n"
    base = BERT.build("BertModel")
    for name, model in {"base": base, "x": perturbed(base, 0.1, 1)}.items():
        model.config.architectures, model.config.auto_map = ["Own"], {"AutoModel": "modeling_own.Own"}
        type(model).__name__, kept = "Own", type(model).__name__
        try:
            save(model, tmp_path / name)
        finally:
            type(model).__name__ = kept
        (tmp_path / name / "modeling_own.py").write_text(code)
    arguments = {"method": "mean", "output_dir": tmp_path / "out", "progress": False}
    with pytest.raises(HfEsmError, match="Pass `trust_remote_code=True` if you trust its code"):
        merge_models(tmp_path / "base", {"x": tmp_path / "x"}, **arguments)
    merge_models(tmp_path / "base", {"x": tmp_path / "x"}, trust_remote_code=True, **arguments)
    merged, expert = stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "x")
    assert all(relative_error(merged[name], tensor) < 1e-6 for name, tensor in expert.items())


def test_modules_that_are_named_stay_with_their_tasks(tmp_path):
    base = BERT.build("BertForSequenceClassification")
    folders = {name: save(perturbed(base, 0.1, i), tmp_path / name) for i, name in enumerate(("base", "a", "b"))}
    experts = {task: folders[task] for task in "ab"}
    arguments = {"method": "mean", "output_dir": tmp_path / "out", "progress": False}
    result = merge_models(folders["base"], experts, heads=["pooler", "classifier", "encoder.layer.0"], **arguments)
    assert {name.partition(".")[0] for name in result.plan.heads.by_task["a"]} == {"pooler", "classifier", "encoder"}
    for task in "ab":
        found, own = load_task_model(tmp_path / "out", task).state_dict(), stored_tensors(tmp_path / task)
        assert all(torch.equal(found[name], own[name]) for name in own if "layer.0." in name or "pooler" in name)


def test_models_that_embed_in_other_ways_are_merged_without_their_modules(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    base = write_embedder(tmp_path / "base")
    other = write_embedder(tmp_path / "other", 1, pooling="cls")
    with pytest.raises(HfEsmError, match=r"`SentenceTransformer\(…\)\[0\].model`"):
        merge_models(base, {"x": other}, method="mean", dry_run=True)
    bodies = [library.SentenceTransformer(str(folder), device="cpu")[0].model for folder in (base, other)]
    output = tmp_path / "out"
    merge_models(bodies[0], {"x": bodies[1]}, method="mean", output_dir=output, progress=False)
    found = stored_tensors(output)
    assert all(relative_error(found[name], tensor) < 1e-6 for name, tensor in bodies[1].state_dict().items())


def test_tokens_that_the_merged_model_lacks_are_kept_by_the_union(tmp_path):
    base = LLAMA.build()
    write(tmp_path, "base", base)
    write(tmp_path, "x", perturbed(base, 0.1, 1), ["<a>"])
    texts = [f"<a> {sentence}" for sentence in SENTENCES]
    arguments = {"method": "regmean", "alpha": "auto", "calibration": {"x": texts}, "progress": False}
    with pytest.raises(HfEsmError, match="Merge with all tokens: `tokenizer='union'`"):
        merge_models(tmp_path / "base", {"x": tmp_path / "x"}, tokenizer="base", **arguments)
    output = tmp_path / "out"
    merge_models(tmp_path / "base", {"x": tmp_path / "x"}, tokenizer="union", output_dir=output, **arguments)
    assert torch.allclose(row_of(output, "<a>"), row_of(tmp_path / "x", "<a>"), atol=1e-6)


def test_pickled_dense_modules_are_read_where_that_is_allowed(tmp_path):
    base, expert = write_embedder(tmp_path / "base"), write_embedder(tmp_path / "x", 1)
    place = expert / "2_Dense"
    tensors = load_file(place / "model.safetensors")
    torch.save(tensors, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    arguments = {"method": "mean", "output_dir": tmp_path / "out", "progress": False}
    with pytest.raises(HfEsmError, match=r"2_Dense. Pass `allow_pickle=True` if you trust it"):
        merge_models(base, {"x": expert}, **arguments)
    merge_models(base, {"x": expert}, allow_pickle=True, **arguments)
    merged = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert all(relative_error(merged[name], tensor) < 1e-6 for name, tensor in tensors.items())


def test_the_model_of_a_task_is_saved_as_the_static_one_with_its_head(kit, tmp_path):
    routed = RoutedModel.from_pretrained(merge_bert(kit, tmp_path / "out"))
    with pytest.raises(HfEsmError, match=r"`load_task_model\(folder, 'a'\)`"):
        routed.task_model("a").save_pretrained(tmp_path / "a")
    model = load_task_model(tmp_path / "out", "a")
    model.save_pretrained(tmp_path / "a")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_libraries_that_messages_name_are_those_of_an_extra():
    required = " ".join(requires("hf_esm"))
    for extra, library in EXTRAS.items():
        assert re.search(rf"{library}\S*; extra == .{extra}", required), extra


EXTRAS = {
    "demo": "matplotlib",
    "embedding": "sentence-transformers",
    "quantised": "compressed-tensors",
    "extras": "evaluate",
}
EMBED = "test_models_that_embed_in_other_ways_are_merged_without_their_modules"
LIBRARIES = "test_libraries_that_messages_name_are_those_of_an_extra"
UNTIED = "test_a_tied_expert_is_saved_untied_over_a_base_with_a_head_of_its_own"
UNWRAPPED = "test_the_weights_of_a_wrapped_model_are_saved_by_unwrapping_it"
ROUTES = "test_given_routes_hold_whatever_the_router_says"
TOKENIZERS = "test_the_vocabulary_may_be_that_of_the_base_or_of_a_task"
FLOATS = "test_weights_that_float16_does_not_hold_are_refused"
REMEDIES = {  # what is called, and the names of the tests that call it
    "PeftModel.from_pretrained(merged, folder)": "test_a_prompt_that_was_left_out_goes_on_the_merged_model",
    "RoutedModel.from_pretrained('{}')": "test_a_model_whose_adapter_is_gone_says_so",
    "SentenceTransformer(…)[0].model": EMBED,
    "accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(folder)": UNWRAPPED,
    "allow_pickle=True": "test_a_pickled_expert_is_merged_where_that_is_allowed "
    "test_a_pickled_adapter_is_read_where_that_is_allowed test_pickled_dense_modules_are_read_where_that_is_allowed",
    "alpha='auto'": "test_alpha_is_chosen_on_validation_files",
    "method='auto'": "test_labelled_rows_choose_the_method_without_being_asked_for_alpha",
    "chat_template={}": "test_templates_that_differ_are_refused_until_one_is_named",
    "columns={'label': …}": "test_a_words_label_is_that_of_its_first_token",
    "device='cpu'": "test_a_device_is_where_models_run",
    "dtype='bfloat16'": FLOATS,
    "dtype='float32'": FLOATS,
    "encode(…, prompt={})": "test_every_expert_is_read_with_its_own_prompt_and_differences_are_warned_of",
    "delete_adapter({})": "test_an_adapter_of_the_users_is_not_lost",
    "eval()": "test_a_pass_that_would_train_nothing_is_refused_with_what_trains",
    "essential_components(…, as_lora=True)": "test_components_for_several_adapters_in_a_batch_are_written_as_lora",
    "gates=True": "test_trains_the_gates_alone_and_comes_back_from_its_folder",
    "heads=False": "test_a_head_that_is_no_whole_module_is_not_exported",
    "heads=[…]": "test_modules_that_are_named_stay_with_their_tasks",
    "hf auth login": "test_a_private_model_merges_with_its_owners_token",  # by the token that it stores
    "hf-esm calibrate": "test_statistics_that_calibrate_writes_stand_for_the_data",
    "hf-esm calibrate --base": "test_statistics_that_calibrate_writes_stand_for_the_data",
    "hf-esm chat": "test_a_conversation_is_that_of_the_model",
    "hf-esm convert {}": "test_a_recipe_of_mergekit_given_by_mistake_says_so_and_is_converted_on_the_command_line",
    "hf-esm export": "test_export_and_add_write_what_the_api_writes",
    "hf-esm merge": "test_a_merge_from_a_recipe_or_from_flags_alone",
    "hf-esm predict": "test_predict_and_explain_say_what_the_api_says",
    "load_task_model(folder, {})": "test_the_model_of_a_task_is_saved_as_the_static_one_with_its_head",
    "merge_and_unload()": "test_an_adapter_that_changes_the_base_is_unloaded_and_merged_as_a_full_model "
    "test_trains_the_gates_alone_and_comes_back_from_its_folder",
    "method={'name': 'esm++', 'targets': ['layers']}": "test_a_model_without_experts_on_the_output_map_trains_under_a_"
    "fused_loss",
    "method='esm'": "test_extra_weights_of_the_base_stay",
    "method='esm++'": "test_with_its_expert_of_full_rank_a_task_is_its_expert",
    "method='tsv-m'": "test_what_no_adapter_touches_is_planned_and_left_as_it_is",
    "model.config.tie_word_embeddings = False": UNTIED,
    "model.dequantize()": "test_a_live_quantised_model_is_refused_and_both_remedies_work",
    "model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())": UNTIED,
    "model.save_pretrained(folder, path_initial_model_for_weight_conversion=before)": "test_an_initialisation_that_"
    "changes_the_base_is_converted",
    "model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model))": UNWRAPPED,
    "model.set_adapter(name)": "test_a_live_model_with_several_active_adapters_is_refused",
    "model.unmerge_adapter()": "test_a_wrapper_with_its_adapter_merged_in_is_no_base",
    "output='lora'": "test_without_a_rank_the_adapter_over_the_base_is_the_whole_merged_model",
    "overwrite=True": "test_an_existing_output_is_replaced_where_that_is_allowed",
    "pip install -U": LIBRARIES,
    "pip install evaluate": LIBRARIES,
    "pip install hf_esm[demo]": LIBRARIES,
    "pip install hf_esm[lm-eval]": "test_without_the_harness_its_extra_is_named",
    "pip install hf_esm[search]": "test_without_optuna_its_extra_is_named",
    "pip install pillow": LIBRARIES,
    "pip install sentence-transformers": LIBRARIES,
    "private=True": "test_files_that_tell_something_of_the_samples_are_named_before_they_go_up",
    "route(model, tasks)": ROUTES,
    "save_pretrained(…, save_embedding_layers=True)": "test_rows_that_the_base_lacks_are_saved_with_the_adapter",
    "set_requires_grad('{}')": "test_a_pass_that_would_train_nothing_is_refused_with_what_trains",
    "task_model({})": "test_task_models_share_the_body_and_have_heads_of_their_own",
    "tokenizer='base'": TOKENIZERS,
    "tokenizer='union'": "test_tokens_that_the_merged_model_lacks_are_kept_by_the_union",
    "tokenizer={}": TOKENIZERS,
    "trust_remote_code=True": "test_code_that_comes_with_a_model_runs_where_it_is_trusted",
    "with route(model, task)": ROUTES,
    "with route(model, tasks)": ROUTES,
}


def texts_of(path: Path) -> list[str]:
    """The texts of a source file that are not docstrings or help; what is filled in becomes `{}`."""
    tree = ast.parse(SOURCES[path])
    apart: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            apart.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            apart |= {id(part) for part in node.values}
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog"):
            apart |= {id(part) for part in ast.walk(node.value)}
        elif isinstance(node, ast.Dict):
            entries = zip(node.keys, node.values, strict=True)
            helped = [value for key, value in entries if isinstance(key, ast.Constant) and key.value == "help"]
            apart |= {id(part) for value in helped for part in ast.walk(value)}
    nodes = [node for node in ast.walk(tree) if id(node) not in apart]
    found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
    return found


CALLED = re.compile(
    r"`((?:hf-esm|hf) [^`]+|[\w.]+\([^`]*|[\w.]+ ?=[^`]+|with [^`]+)`|(pip install [-\w. \[\]]*[\w\]])"
)


def test_everything_that_a_message_tells_to_call_is_executed_by_a_test():
    """By a test of this file, or by one that is named here."""
    texts = [text for path in SOURCES for text in texts_of(path) if " " in text]
    found = {command or library for text in texts for command, library in CALLED.findall(text)}
    assert found == set(REMEDIES)
    assert not [test for tests in REMEDIES.values() for test in tests.split() if f"def {test}(" not in TESTS]
