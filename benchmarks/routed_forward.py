"""Time the forward pass of a routed model against the static model and other implementations, in one run.

    python benchmarks/routed_forward.py FOLDER [--rank 32] [--batch-size 32] [--rounds 15]

benchmarks/suite.py describes FOLDER. One batch of test rows that mixes all tasks runs in turn through

    static                  the merged model alone
    known                   the routed model, the task of each sample named (`route`)
    decided                 the routed model, the router deciding
    dense                   one dense update per task and layer, chosen per sample, as published for ESM++
    PEFT, known             the same experts as LoRA adapters, one of `adapter_names` per sample
    PEFT Arrow              the same adapters with PEFT's per-token router

`--rounds` times. Every time is divided by that of the static model in the same round; the median and the range of the
ratios are printed. Then follow:

- the first three again, in float32 and in bfloat16, compiled (`fullgraph=True`) and not, on a GPU if there is one,
  else on the CPU, each against the static model of the same precision;
- the accuracy on 100 test rows per task, with each task's head, of the static model, both routed ones, and Arrow;
- how the time grows with tasks and samples, the size on disk, and the parameters added per task.
"""

import argparse
import gzip
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from peft import ArrowConfig, PeftModel, create_arrow_model
from torch import Tensor, nn

from hf_esm import RoutedModel, merge_models
from hf_esm.checkpoints import attach_head
from hf_esm.data import SampleOptions, collate
from hf_esm.metrics import accuracy, load_labelled
from hf_esm.routing.experts import load_experts
from hf_esm.tuners import route
from hf_esm.utils import default_accelerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tasks = sorted(path.name for path in (args.folder / "experts").iterdir() if path.is_dir())
    rows = {
        task: json.loads(gzip.decompress((args.folder / "data" / f"{task}.json.gz").read_bytes())) for task in tasks
    }
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "routed"
        merge_models(
            args.folder / "base",
            {task: args.folder / "experts" / task for task in tasks},
            method="esm++",
            rank=args.rank,
            calibration={
                t: [{k: v for k, v in r.items() if k != "label"} for r in rows[t]["validation"]] for t in tasks
            },
            max_length=96,
            output_dir=str(output),
            progress=False,
        )
        routed = RoutedModel.from_pretrained(output)
        adapters = routed.export_lora(Path(scratch) / "lora", heads=False)
        mixed = PeftModel.from_pretrained(bare(output), str(adapters[tasks[0]]), adapter_name=tasks[0])
        for task in tasks[1:]:
            mixed.load_adapter(str(adapters[task]), adapter_name=task)
        # Arrow would also route BERT's pooler, and fail on it.
        unpooled = transformers.AutoModel.from_pretrained(output, add_pooling_layer=False).eval()
        arrow = create_arrow_model(unpooled, [str(path) for path in adapters.values()], ArrowConfig(top_k=1))
        dense = materialised(bare(output), output)

        options = SampleOptions(num_samples=100, seed=7, max_length=96)
        test = {
            task: load_labelled(rows[task]["test"], routed.processor, routed.task_model(task).config, task, options)
            for task in tasks
        }
        names = [tasks[i % len(tasks)] for i in range(args.batch_size)]
        samples = [test[name].samples[i // len(tasks)] for i, name in enumerate(names)]
        batch = collate(samples, routed.model.get_base_model().config)
        chosen = torch.tensor([tasks.index(name) for name in names])
        static = bare(output)

        def known() -> Any:
            with routed.route(names):
                return routed(**batch)

        def picked() -> Any:
            Dense.chosen = chosen
            return dense(**batch)

        ways: dict[str, Callable[[], Any]] = {
            "static": lambda: static(**batch),
            "known": known,
            "decided": lambda: routed(**batch),
            "dense": picked,
            "PEFT, known": lambda: mixed.eval()(**batch, adapter_names=names),
            "PEFT Arrow": lambda: arrow.eval()(**batch),
        }
        seconds = measure(ways, args.rounds)
        print(f"rank {args.rank}, {len(tasks)} tasks, batch {tuple(batch['input_ids'].shape)}, ", end="")
        print(f"{torch.get_num_threads()} threads: static {1000 * statistics.median(seconds['static']):.0f} ms")
        for name in ways:
            ratios = [routed / plain for routed, plain in zip(seconds[name], seconds["static"], strict=True)]
            print(f"  {name:12} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        ratios = [dense / routed for routed, dense in zip(seconds["known"], seconds["dense"], strict=True)]
        print(f"  dense against known: {statistics.median(ratios):.1f}")
        with torch.no_grad(), routed.route(names):
            apart = (routed(**batch).last_hidden_state - ways["PEFT, known"]().last_hidden_state).abs().max()
            dense_apart = (known().last_hidden_state - picked().last_hidden_state).abs().max()
        print(f"  known and PEFT known differ by {float(apart):.1e}, known and dense by {float(dense_apart):.1e}")

        measure_kinds(output, batch, names, args.rounds)
        scores = {"static": 0.0, "known": 0.0, "decided": 0.0, "PEFT Arrow": 0.0}
        for task in tasks:
            for name, forced in (("static", "static"), ("known", task), ("decided", None)):
                with routed.route(forced) if forced else nullcontext():
                    scores[name] += accuracy(routed.task_model(task), test[task]) / len(tasks)
            scores["PEFT Arrow"] += accuracy(attach_head(arrow.get_base_model(), output, task), test[task]) / len(
                tasks
            )
        print("  accuracy: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items()))
        measure_growth(output, Path(scratch), batch, args.rounds)
        size = (output / "routed" / "adapter_model.safetensors").stat().st_size
        added = sum(a[0].numel() + b[0].numel() for a, b in load_experts(output).factors.values())
        whole = sum(parameter.numel() for parameter in static.parameters())
        print(f"  adapter {size / 1e6:.1f} MB, {added:,} parameters per task ({added / whole:.1%} of the model)")


def measure_kinds(output: Path, batch: dict[str, Tensor], names: list[str], rounds: int) -> None:
    """Print the time of the routed forward pass against the static one, by precision, compiled and not."""
    device = default_accelerator().device
    if device.type == "cpu":
        print("  No GPU was found.")
    batch = send_to_device(batch, device)
    for dtype in (torch.float32, torch.bfloat16):
        routed = RoutedModel.from_pretrained(output, dtype=dtype).to(device)
        static = bare(output).to(device, dtype)
        for how, prepared in (("eager", lambda model: model), ("compiled", partial(torch.compile, fullgraph=True))):
            plain, experts = prepared(static), prepared(routed.model)

            def known(routed: RoutedModel = routed, experts: Any = experts) -> Any:
                with routed.route(names):
                    return experts(**batch)

            ways = {
                "static": lambda plain=plain: plain(**batch),
                "known": known,
                "decided": lambda experts=experts: experts(**batch),
            }
            seconds = measure(ways, rounds)
            line = f"  {device.type} {str(dtype).removeprefix('torch.')} {how}: "
            line += f"static {1000 * statistics.median(seconds['static']):.1f} ms"
            for name in ("known", "decided"):
                ratios = [routed / plain for routed, plain in zip(seconds[name], seconds["static"], strict=True)]
                line += f", {name} {statistics.median(ratios):.2f}"
            print(line, flush=True)


def measure_growth(output: Path, scratch: Path, batch: dict[str, Tensor], rounds: int) -> None:
    """Print how the time with known routes grows with tasks (each expert repeated eight times) and with samples, for
    whole texts and for single tokens, as in generation.
    """
    experts, models = load_experts(output), {}
    for times in (1, 8):
        wide = replace(
            experts,
            tasks=[f"{task}-{i}" for i in range(times) for task in experts.tasks],
            factors={m: (a.repeat(times, 1, 1), b.repeat(times, 1, 1)) for m, (a, b) in experts.factors.items()},
            features={
                f"{task}-{i}": {module: rows.clone() for module, rows in features.items()}
                for i in range(times)
                for task, features in experts.features.items()
            },
        )
        folder = scratch / f"wide-{times}"
        wide.save(folder / "routed", bare(output))
        models[len(wide.tasks)] = PeftModel.from_pretrained(bare(output), str(folder), subfolder="routed").eval(), wide
    static = bare(output)
    for length in (batch["input_ids"].shape[1], 1):
        for size in (8, 32, 128):
            turns = -(-size // len(batch["input_ids"]))
            inputs = {name: rows.repeat(turns, 1)[:size, :length] for name, rows in batch.items()}
            ways = {"static": lambda inputs=inputs: static(**inputs)}
            for tasks, (model, wide) in models.items():
                names = [wide.tasks[(7 * i) % tasks] for i in range(size)]

                def known(model: Any = model, names: list[str] = names, inputs: dict = inputs) -> Any:
                    with route(model, names):
                        return model(**inputs)

                ways[f"{tasks} tasks"] = known
            seconds = measure(ways, rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            line = ", ".join(f"{name} {1000 * median:.1f} ms" for name, median in medians.items())
            print(f"  {size} samples of {length} tokens: {line}")


def bare(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def measure(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:  # the first two are warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Dense(nn.Module):
    """A linear map with a dense update per task; each sample gets the update of its task."""

    chosen: Tensor

    def __init__(self, layer: nn.Linear, updates: Tensor):
        super().__init__()
        self.layer, self.updates = layer, updates

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.bmm(x, self.updates[self.chosen].mT)


def materialised(model: transformers.PreTrainedModel, folder: Path) -> transformers.PreTrainedModel:
    for name, (a, b) in load_experts(folder).factors.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Dense(model.get_submodule(name), b @ a))
    return model


if __name__ == "__main__":
    main()
