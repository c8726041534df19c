"""Every file and folder name in the folder of a merged model."""

# As Transformers and PEFT name them:
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"

# As Sentence Transformers names them; the settings of the Transformer module by their present name, and older ones:
MODULES_FILE = "modules.json"
SENTENCE_SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)

# The card, as the Hub names it, and the folder of its pictures:
CARD_FILE = "README.md"
PICTURES_FOLDER = "comparison"
SCORES_PICTURE = "scores.png"

# Scores as the Hub reads them beside the card:
EVALUATION_FOLDER = ".eval_results"

# In every folder that a merge wrote:
RECIPE_FILE = "merge_recipe.yaml"
REPORT_FILE = "merge_report.json"

# A folder for each task, with the task's config and the weights that the task keeps for itself:
HEADS_FOLDER = "heads"
HEAD_WEIGHTS = "head.safetensors"

# Of compressed experts, in the folder of each task: its own biases, norms and convolutions, and factors of updates
# that no routed expert holds; and beside these folders the base's weights that the factors are updates of:
BODY_WEIGHTS = "body.safetensors"
BASE_WEIGHTS = "base.safetensors"

# Samples that the caller passed in memory, which the recipe names:
CALIBRATION_FOLDER = "calibration"

# In the folder of a routed model: the adapter, with the features of its router, and hashes of what is loaded:
ROUTED_FOLDER = "routed"
ROUTER_FEATURES = "router_features.safetensors"
HASHES_FILE = "hashes.json"

# In the folder of a refined model whose gates are not folded into its weights: their adapter.
REFINED_FOLDER = "refined"

# Beside the weights of an expert:
STATISTICS_FILE = "esm_statistics.safetensors"
