"""Where weights come from (a Hub id at a pinned commit, a folder, a live model, a LoRA adapter) and go (a folder)."""

from .lora import LoraCheckpoint
from .reader import Checkpoint, FolderCheckpoint, LiveCheckpoint
from .sources import ModelSource, open_checkpoint, resolve_class, resolve_source, whole_folder
from .writer import publish_folder, staging_folder, write_plan


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
