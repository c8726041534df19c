"""Models of Sentence Transformers from the Hub, merged, pushed and loaded there by the library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from hf_esm import merge_models
from support.embedders import TEXTS, embeddings_by_hand, texts_of, write_embedder
from support.hub import TOKEN, process
from support.hub_server import HubServer


pytestmark = pytest.mark.hub
EXPERTS = {"one": "me/one", "two": "me/two"}


def push(folder: Path) -> None:
    api = HfApi(token=TOKEN)
    for name in ("base", *EXPERTS):
        api.create_repo(f"me/{name}")
        api.upload_folder(repo_id=f"me/{name}", folder_path=folder / name)


def merge_and_push(output: Path) -> tuple[str, Any]:
    arguments = {"calibration": {task: texts_of(i) for i, task in enumerate(EXPERTS)}, "progress": False}
    plan = merge_models("me/base", EXPERTS, dry_run=True, **arguments)
    result = merge_models("me/base", EXPERTS, method="esm", output_dir=output, **arguments)
    result.push_to_hub("me/merged", token=TOKEN)
    return str(plan), result.plan.experts["two"].revision


def encode(name: str) -> list[list[float]]:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(name, device="cpu").encode(TEXTS, prompt="so the ").tolist()


def test_a_merge_of_hub_models_is_pushed_and_loaded_by_the_library(tmp_path):
    pytest.importorskip("sentence_transformers")
    models = {name: tmp_path / "models" / name for name in ("base", *EXPERTS)}
    for seed, (name, folder) in enumerate(models.items()):
        write_embedder(folder, seed, old=name == "two")
    hub = HubServer({TOKEN: "me"}).start()
    try:
        with process(hub, tmp_path / "home") as run:
            run(push, tmp_path / "models")
            plan, revision = run(merge_and_push, tmp_path / "merged")
            found = torch.tensor(run(encode, "me/merged"))
    finally:
        hub.stop()
    assert revision in hub.repos["me/two"].commits and f"two: me/two @ {revision[:12]}, BertModel" in plan
    expected = embeddings_by_hand(tmp_path / "merged", ["so the " + text for text in TEXTS], "mean")
    assert torch.nn.functional.cosine_similarity(found.double(), expected).min() > 1 - 1e-5
    again = merge_models(
        models["base"],
        {name: models[name] for name in EXPERTS},
        method="esm",
        progress=False,
        calibration={task: texts_of(i) for i, task in enumerate(EXPERTS)},
        output_dir=tmp_path / "local",
    )
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (again.output_dir / name).read_bytes()
