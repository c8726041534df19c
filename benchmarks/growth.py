"""How the time of a merge by ESM grows with tasks, width, depth and tokens, as a picture.

    python benchmarks/growth.py [--rounds 5] [--method "{name: esm}"] [--output docs/growth.png]

A small Llama of random weights and experts of it are merged in memory: 4 tasks, width 128, 2 blocks, 1,024 tokens per
task. Then one of the four is half, twice and four times as large. Each point is the median over `--rounds` of the
processor's seconds, calibration included, over those of the first merge in the same round, with the minimum and
maximum; one thread. Imports and the making of models are not counted.
"""

import argparse
import logging
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from hf_esm import merge_models
from hf_esm.metrics.drawing import Chart, Line
from hf_esm.metrics.plots import plot_chart


START = {"tasks": 4, "width": 128, "blocks": 2, "tokens": 1024}
FACTORS = (0.5, 1, 2, 4)
COLOURS = {"tasks": "C0", "width": "C1", "blocks": "C2", "tokens": "C3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", default="esm", help="name, or settings as YAML")
    parser.add_argument("--output", type=Path, default=Path("growth.png"))
    args = parser.parse_args()
    logging.getLogger("hf_esm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    method = yaml.safe_load(args.method)
    seconds_of(method, **START)
    ratios = defaultdict(list)
    for _ in range(args.rounds):
        first = seconds_of(method, **START)
        for name, value in START.items():
            for factor in FACTORS:
                taken = first if factor == 1 else seconds_of(method, **START | {name: int(factor * value)})
                ratios[name, factor].append(taken / first)
    for name in START:
        cells = [f"{factor:g}: {statistics.median(ratios[name, factor]):.2f}" for factor in FACTORS]
        print(f"{name:7} {', '.join(cells)}")
    print(f"the first merge took {first:.1f} s")
    lines = [
        Line(
            name,
            [(factor, statistics.median(ratios[name, factor])) for factor in FACTORS],
            COLOURS[name],
            errors={factor: (min(ratios[name, factor]), max(ratios[name, factor])) for factor in FACTORS},
        )
        for name in START
    ]
    sizes = ", ".join(f"{value:,} {name}" for name, value in START.items()).replace("128 width", "width 128")
    caption = f"Median, minimum and maximum of {args.rounds} rounds. At first: {sizes} per task."
    chart = Chart(
        "Time of a merge by ESM", "growth", caption, "times as many as at first", "times as long", lines, False, True
    )
    plot_chart(chart, args.output)


def seconds_of(method: object, tasks: int, width: int, blocks: int, tokens: int) -> float:
    """Return the processor's seconds of one merge."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    base, length = LlamaForCausalLM(config).eval(), 64
    experts, samples = {}, {}
    for task in range(tasks):
        expert = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for weight, start in zip(expert.parameters(), base.parameters(), strict=True):
                weight.copy_(start + 0.1 * start.std().nan_to_num() * torch.randn_like(start))
        experts[f"task{task}"] = expert
        rows = torch.randint(5, config.vocab_size, (tokens // length, length))
        samples[f"task{task}"] = [{"input_ids": row} for row in rows]
    began = time.process_time()
    merge_models(base, experts, method=method, calibration=samples, num_samples=0, progress=False)
    return time.process_time() - began


if __name__ == "__main__":
    main()
