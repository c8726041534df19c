"""Where weights come from (a Hub id at a pinned commit, a folder, a live model, a LoRA adapter) and go (a folder)."""

from .adapters import LoraCheckpoint
from .conversion import publish_folder, staging_folder, write_plan
from .sources import ModelSource, open_checkpoint, resolve_class, resolve_source, whole_folder
from .stored import Checkpoint, FolderCheckpoint, LiveCheckpoint


__all__ = [
    "Checkpoint",
    "FolderCheckpoint",
    "LiveCheckpoint",
    "LoraCheckpoint",
    "ModelSource",
    "open_checkpoint",
    "publish_folder",
    "resolve_class",
    "resolve_source",
    "staging_folder",
    "whole_folder",
    "write_plan",
]
