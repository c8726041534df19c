"""Two processes merge as one does, from the same statistics and from their own shards."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_esm import ActivationStatistics, calibrate, merge_models
from hf_esm.checkpoints import REFINED_FOLDER
from hf_esm.checkpoints.layout import ADAPTER_WEIGHTS
from hf_esm.data import save_samples
from support.helpers import perturbed, save
from support.problems import relative_error
from support.processes import launch
from support.refining_toys import TASKS, samples_of
from support.tiny import LLAMA
from support.toys import LABELS, largest_difference, texts, weights, write_models, write_rows


pytestmark = pytest.mark.slow


COUNTS = {"a": 9, "b": 9, "c": 9}  # samples: an odd number, so that one process gets more than the other
OUTCOMES = ("found", "expected")  # on two processes, on one
ONE = dict.fromkeys(COUNTS, 1)  # the other process gets none


def arguments(folder, counts=COUNTS, **changes):
    """Arguments of `merge_models` as JSON takes them, for two full experts and an adapter."""
    experts = {"a": str(folder / "a"), "b": str(folder / "b"), "c": str(folder / "c-lora")}
    calibration = {task: texts(seed, counts[task]) for seed, task in enumerate(counts)}
    return {"base": str(folder / "base"), "experts": experts, "calibration": calibration, "batch_size": 2, **changes}


def language_arguments(folder, **changes):
    """Arguments of `merge_models` as JSON takes them, for two language models, which are written to the folder."""
    base = LLAMA.build()
    save(base, folder / "base")
    calibration = {}
    for seed, task in enumerate(TASKS):
        save(perturbed(base, 0.1, seed), folder / task)
        samples, statistics = (folder / f"{task} {kind}.safetensors" for kind in ("samples", "statistics"))
        save_samples(samples_of(task, 3, 27), samples)
        calibrate(folder / task, samples_of(task, 3, 9), progress=False).save(statistics)
        calibration[task] = {"samples": str(samples), "statistics": str(statistics)}
    experts = {task: str(folder / task) for task in TASKS}
    return {"base": str(folder / "base"), "experts": experts, "calibration": calibration, "batch_size": 3, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every case of `merge_on_ranks.py` as two processes and as one left it."""
    folder = write_models(tmp_path_factory.mktemp("ranks"))
    for task, count in COUNTS.items():
        write_rows(folder / f"{task}.jsonl", texts(ord(task), count))
    rows = {t: [{"text": x, "label": i % len(LABELS[t])} for i, x in enumerate(texts(7, 6))] for t in LABELS}
    cases = {
        "sharded": arguments(folder, statistics_dir=str(folder / "sharded" / "statistics")),
        "one sample": arguments(folder, ONE, statistics_dir=str(folder / "one sample" / "statistics")),
        "stacked": arguments(folder, method="esm-vit"),
        "alpha": arguments(folder, alpha="auto", validation=rows, progress=False),
        "no statistics": arguments(folder, calibration=None, method="tsv-m"),
        "trimmed": arguments(folder, calibration=None, method="ties"),
        "dropped": arguments(folder, calibration=None, method="della"),
        "solved": arguments(folder, calibration=None, method="wudi"),
        "shards": arguments(folder, calibration=None, method="tsv-m", max_shard_size="20KB"),
        "routed": arguments(folder, method={"name": "esm++", "rank": 4}),
        "learned": arguments(
            folder, method={"name": "concrete-adamerging", "steps": 3, "inner_rate": 0.001, "coefficient_steps": 20}
        ),
    }
    language = language_arguments(folder / "language", refine={"components": 4, "steps": 12})
    samples = {task: both["samples"] for task, both in language["calibration"].items()}
    cases["refined"] = language | {"method": "regmean", "alpha": "auto", "refine": language["refine"] | KEEP}
    cases["chosen and refined"] = language | {"calibration": samples}
    exact = {"name": "esm", "tolerance": 0.0}  # with a tolerance, some processors multiply in bfloat16
    cases["refined classifiers"] = arguments(folder, method=exact, refine={"components": 4, "steps": 12})
    adapters = {"c": str(folder / "c-lora"), "same": str(folder / "c-lora")}
    cases["adapter"] = arguments(folder, experts=adapters, calibration=None, method="mean", output="lora", rank=3)
    for name, case in cases.items():
        kept = {"statistics_dir": folder / name / "expected statistics"} if "statistics_dir" in case else {}
        merge_models(**{**case, "progress": False, **kept}, output_dir=folder / name / "expected")
    saved = str(folder / "sharded" / "expected statistics")
    cases["same statistics"] = arguments(folder, calibration=saved)
    cases["projected"] = arguments(folder, calibration=saved, method="cat")
    for name in ("same statistics", "projected"):
        merge_models(**cases[name], output_dir=folder / name / "expected")
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(Path(__file__).parents[1] / "support" / "merge_on_ranks.py", folder)
    return folder


def ranks(folder, name):
    """What each process recorded."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


KEEP = {"keep_adapter": True}
CASES = {  # relative error of every weight, against one process
    "same statistics": 1e-6,
    "projected": 1e-6,
    "no statistics": 1e-6,
    "sharded": 1e-4,
    "one sample": 1e-4,
    "stacked": 1e-4,
    "alpha": 1e-4,
    "trimmed": 1e-6,
    "dropped": 1e-6,
    "solved": 1e-6,
    "shards": 1e-6,
    "routed": 1e-4,
    "learned": 1e-2,  # Adam's first steps have one length however small a gradient is
}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_two_processes_give_the_weights_of_one(folder, name):
    found, expected = weights(folder / name / "found"), weights(folder / name / "expected")
    assert largest_difference(found, expected) < CASES[name]
    assert largest_difference(found, weights(folder / "base")) > 0.01


def test_two_processes_write_the_adapter_of_one(folder):
    found, expected = (load_file(folder / "adapter" / outcome / ADAPTER_WEIGHTS) for outcome in OUTCOMES)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    main, other = ranks(folder, "adapter")
    assert main["result"] == other["result"]
    errors = [report["rank_error"] for report in other["result"]["weights"] if report["rank"]]
    assert errors and all(0.01 < error < 1 for error in errors)


@pytest.mark.parametrize("name", ["sharded", "one sample"])
@pytest.mark.parametrize("task", COUNTS)
def test_sharded_proxies_give_the_statistics_of_all(folder, name, task):
    found = ActivationStatistics.load(folder / name / "statistics" / f"{task}.safetensors")
    expected = ActivationStatistics.load(folder / name / "expected statistics" / f"{task}.safetensors")
    assert found.keys_of == expected.keys_of
    assert found.provenance == expected.provenance
    assert found.provenance.num_samples == (9 if name == "sharded" else 1)
    for weight in expected:
        assert found[weight].count == expected[weight].count > 0
        assert relative_error(found[weight].mean, expected[weight].mean) < 1e-5
        grams = [entry.factor.double().T @ entry.factor.double() for entry in (found[weight], expected[weight])]
        assert relative_error(*grams) < 1e-5


@cases
def test_every_process_returns_the_same_result(folder, name):
    main, other = ranks(folder, name)
    assert main["result"] == other["result"]
    assert main["result"]["output_dir"] == str(folder / name / "found")
    assert len(main["result"]["weights"]) == 37  # though each process merged a part of them


def test_alpha_is_the_one_that_one_process_chooses(folder):
    main, other = ranks(folder, "alpha")
    report = json.loads((folder / "alpha" / "expected" / "merge_report.json").read_text())
    assert main["result"]["alpha_scores"] == report["alpha_scores"] != {}
    assert main["result"]["alpha"] == other["result"]["alpha"] == report["alpha"]


@cases
def test_the_main_process_alone_writes_and_reports(folder, name):
    main, other = ranks(folder, name)
    written = [Path(path).name for path in other["touched"] if "/.scratch" not in path]
    shared = sorted(path.name for path in (folder / name / "found").glob("model-*.safetensors"))
    assert sorted(set(written)) == shared[1::2]  # every other file, where there are several
    assert (len(shared) > 4) is (name == "shards")
    assert [path for path in main["touched"] if path.endswith("updates-1.safetensors")] == []
    assert not {Path(path).name for path in main["touched"]} & set(shared[1::2])
    assert any(path.endswith("config.json") for path in main["touched"])
    assert sorted(path.name for path in (folder / name).iterdir() if "statistics" not in path.name) == [
        "expected",
        "found",
    ]
    assert not list((folder / name / "found").glob(".*"))
    quiet = name == "alpha"
    assert all((bar in main["stderr"]) is not quiet for bar in ("Checking weights:", "Merging:", "Writing:"))
    assert main["stdout"] == other["stdout"] == other["stderr"] == ""
    assert main["calls"] > 37
    assert other["calls"] == 0


def test_without_an_output_folder_every_process_can_load_the_model(folder):
    main, other = ranks(folder, "temporary")
    assert main["norm"] == other["norm"] > 0
    assert main["left"] is other["left"] is False


def test_routed_experts_are_the_same_on_two_processes(folder):
    found, expected = (load_file(folder / "routed" / of / "routed" / "adapter_model.safetensors") for of in OUTCOMES)
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        if name.endswith("_A"):  # directions have no sign of their own
            b = name.removesuffix("A") + "B"
            assert relative_error(found[b] @ found[name], expected[b] @ a) < 1e-3


REFINED = {"refined": 1e-6, "chosen and refined": 1e-4, "refined classifiers": 1e-4}  # relative error of every weight


@pytest.mark.parametrize("name", REFINED)
def test_two_processes_choose_and_refine_as_one_does(folder, name):
    found, expected = (weights(folder / name / of) for of in OUTCOMES)
    assert largest_difference(found, expected) < REFINED[name]
    main, other = ranks(folder, name)
    assert main["result"] == other["result"]
    assert [path for path in other["touched"] if "/.scratch" not in path] == []
    report = json.loads((folder / name / "expected" / "merge_report.json").read_text())
    recipe = yaml.safe_load((folder / name / "expected" / "merge_recipe.yaml").read_text())
    result = main["result"]
    assert (result["alpha"], result["chosen_by"]) == (report["alpha"], report["chosen_by"])
    assert result["method"] == recipe["method"]["name"]
    assert result["refined"] == pytest.approx(report["refined"], rel=1e-3) and len(result["refined"]) == 3
    for task, of_one in report["agreement"].items():
        assert result["agreement"][task] == pytest.approx(of_one, abs=1e-4)
    by = "default" if name == "refined classifiers" else "agreement"
    assert result["chosen_by"] == by
    assert result["choice"] == report["choice"]


def test_two_processes_train_the_gates_of_one(folder):
    found, expected = (
        load_file(folder / "refined" / of / REFINED_FOLDER / "adapter_model.safetensors") for of in OUTCOMES
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
        assert "gates" not in name or tensor.abs().max() > 0.05


@pytest.mark.parametrize("stage", ["loading", "running", "merging", "writing", "experts"])
def test_an_error_in_one_process_ends_all_with_it_and_leaves_nothing(folder, stage):
    main, other = ranks(folder, f"failing {stage}")
    assert main["error"] == "HfEsmError: Process 1 of 2 stopped: OSError: the disk of this process is full"
    assert other["error"] == "OSError: the disk of this process is full"
    assert main["left"] == other["left"] == []


@pytest.mark.parametrize("name", ["example", "command line"])
def test_the_example_and_the_command_line_run_on_two_processes(folder, name):
    files = {task: str(folder / f"{task}.jsonl") for task in "ab"}
    experts = {task: folder / task for task in "ab"}
    result = merge_models(folder / "base", experts, calibration=files, progress=False)
    assert largest_difference(weights(folder / name / "found"), weights(result.output_dir)) < 1e-4
    main, other = ranks(folder, name)
    assert "esm: 2 experts merged, alpha 1 (the default)\n" in main["stdout"]
    assert other["stdout"] == other["stderr"] == ""
    assert main.get("status", 0) == other.get("status", 0) == 0
