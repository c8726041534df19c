"""A folder on its way to the Hub.

Comes in: a merged model's folder and plain values about it. Goes out: its card, the hashes of its files, an upload.
"""

from .cards import pipeline_of, template, with_section
from .hashes import verify_hashes, write_hashes
from .push import check_routed, push_folder


__all__ = [
    "check_routed",
    "pipeline_of",
    "push_folder",
    "template",
    "verify_hashes",
    "with_section",
    "write_hashes",
]
