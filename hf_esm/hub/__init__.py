"""A folder on its way to the Hub.

Comes in: a merged model's folder and plain values about it. Goes out: its card, the hashes of its files, an upload.
"""

from .cards import licence_metadata, pipeline_of, public_name, template
from .changes import card_with_experts, with_section
from .hashes import verify_routed, write_hashes
from .push import push_folder


__all__ = [
    "card_with_experts",
    "licence_metadata",
    "pipeline_of",
    "public_name",
    "push_folder",
    "template",
    "verify_routed",
    "with_section",
    "write_hashes",
]
