"""What a model's folder holds, and how it is read and written.

Comes in: what a user names as a model (Hub id, folder, adapter, live model). Goes out: a `Checkpoint`, whose weights
are read one at a time; and back to disk: sharded safetensors, heads, LoRA adapters.
"""

from .adapter_files import read_adapter_tensors
from .adapter_settings import check_routed, read_routed_settings, read_settings
from .adapters import AdapterCheckpoint
from .base import Checkpoint, LiveCheckpoint, quiet_loading, quiet_peft
from .configs import buildable, read_config
from .conversion import output_dtype, to_stored, write_plan, written_config
from .embedding import EmbeddingCheckpoint
from .heads import attach_head, load_base_with_head, load_task_model, save_head
from .layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    BODY_WEIGHTS,
    CALIBRATION_FOLDER,
    CARD_FILE,
    CHAT_TEMPLATE,
    CONFIG_FILE,
    EVALUATION_FOLDER,
    GENERATION_CONFIG,
    HASHES_FILE,
    HEAD_WEIGHTS,
    HEADS_FOLDER,
    PICTURES_FOLDER,
    RECIPE_FILE,
    REFINED_FOLDER,
    REPORT_FILE,
    ROUTED_FOLDER,
    ROUTER_FEATURES,
    SCORES_PICTURE,
    STATISTICS_FILE,
    WEIGHTS_FILE,
)
from .live_embedders import copy_of_embedder
from .loading import ExpertLoader
from .lora_export import rank_settings, write_adapter, write_lora_adapter
from .modules import SentenceModules, common_settings, read_modules
from .parts import DerivedCheckpoint, write_body
from .pooling import prompt_before
from .processors import differing_processors, find_processors, first_processor, load_processor
from .repositories import whole_folder
from .shards import ShardedWriter
from .sources import (
    Access,
    ModelSource,
    ModelSpec,
    base_of_adapters,
    model_identity,
    open_checkpoint,
    resolve_class,
    resolve_models,
    resolve_source,
)
from .stored import FolderCheckpoint, NotDownloadedError, weight_files
from .vocabulary import GivenRows, InVocabulary, TokenRows, has_token_embeddings, token_embedding, token_rows


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BASE_WEIGHTS",
    "BODY_WEIGHTS",
    "CALIBRATION_FOLDER",
    "CARD_FILE",
    "CHAT_TEMPLATE",
    "CONFIG_FILE",
    "EVALUATION_FOLDER",
    "GENERATION_CONFIG",
    "HASHES_FILE",
    "HEADS_FOLDER",
    "HEAD_WEIGHTS",
    "PICTURES_FOLDER",
    "RECIPE_FILE",
    "REFINED_FOLDER",
    "REPORT_FILE",
    "ROUTED_FOLDER",
    "ROUTER_FEATURES",
    "SCORES_PICTURE",
    "STATISTICS_FILE",
    "WEIGHTS_FILE",
    "Access",
    "AdapterCheckpoint",
    "Checkpoint",
    "DerivedCheckpoint",
    "EmbeddingCheckpoint",
    "ExpertLoader",
    "FolderCheckpoint",
    "GivenRows",
    "InVocabulary",
    "LiveCheckpoint",
    "ModelSource",
    "ModelSpec",
    "NotDownloadedError",
    "SentenceModules",
    "ShardedWriter",
    "TokenRows",
    "attach_head",
    "base_of_adapters",
    "buildable",
    "check_routed",
    "common_settings",
    "copy_of_embedder",
    "differing_processors",
    "find_processors",
    "first_processor",
    "has_token_embeddings",
    "load_base_with_head",
    "load_processor",
    "load_task_model",
    "model_identity",
    "open_checkpoint",
    "output_dtype",
    "prompt_before",
    "quiet_loading",
    "quiet_peft",
    "rank_settings",
    "read_adapter_tensors",
    "read_config",
    "read_modules",
    "read_routed_settings",
    "read_settings",
    "resolve_class",
    "resolve_models",
    "resolve_source",
    "save_head",
    "to_stored",
    "token_embedding",
    "token_rows",
    "weight_files",
    "whole_folder",
    "write_adapter",
    "write_body",
    "write_lora_adapter",
    "write_plan",
    "written_config",
]
