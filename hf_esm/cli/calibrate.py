"""Run an expert over unlabelled samples and write its activation statistics, which serve every later merge."""

import argparse

from accelerate import PartialState

from ..calibration import calibrate
from ..data import SampleOptions
from ..utils import check_path
from .console import say
from .flags import add_flags, add_trust_flags, count, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of the expert")
    parser.add_argument("data", help="samples: JSON lines, JSON, CSV, Parquet or text")
    parser.add_argument("-o", "--output", required=True, help="file to write (.safetensors), or a folder")
    parser.add_argument("--base", help="the base model, for ESM++ (default for adapters: the one that they name)")
    parser.add_argument("--compress-rank", type=count, help="keep this many rows of each factor (smaller, lossy)")
    parser.add_argument("--batch-size", type=count, default=8, help="samples per batch and process (default: 8)")
    parser.add_argument("--max-memory", help="memory to calibrate in, such as 16GB; the rest goes to disk")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    add_trust_flags(parser)
    add_flags(parser, SampleOptions)


def run(arguments: argparse.Namespace) -> None:
    check_path(arguments.output, "--output")
    statistics = calibrate(
        arguments.model,
        arguments.data,
        base=arguments.base,
        batch_size=arguments.batch_size,
        max_memory=arguments.max_memory,
        progress=not arguments.no_progress,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
        **options_of(arguments, SampleOptions),
    )
    if arguments.compress_rank:
        statistics = statistics.compress(arguments.compress_rank)
    if PartialState().is_main_process:
        path = statistics.save(arguments.output)
        line = f"{path}: {len(statistics)} linear maps, {statistics.provenance.num_samples} samples"
        if arguments.compress_rank:
            line += f", compression error up to {statistics.provenance.compression_error:.1%}"
        say(line)
