"""Say from the headers of the files, and from a few matrices of local models, whether the experts fit the base, what
would be merged how, and what the merge would cost.
"""

import argparse

from ..merging import merge_models
from .console import say
from .requests import add_merge_arguments, merge_request


add_arguments = add_merge_arguments


def run(arguments: argparse.Namespace) -> None:
    say(merge_models(**merge_request(arguments), dry_run=True))
