"""Every file and folder name in a merged model's folder."""

# What stands in every folder that a merge wrote.
RECIPE_FILE = "merge_recipe.yaml"


REPORT_FILE = "merge_report.json"


PICTURES_FOLDER = "comparison"  # of its card, if there are any


CALIBRATION_FOLDER = "calibration"  # beside a merged model: the samples that were given in memory


HEADS_FOLDER = "heads"


HEAD_WEIGHTS = "head.safetensors"


ROUTED_FOLDER = "routed"


ROUTER_FEATURES = "router_features.safetensors"


HASHES_FILE = "hashes.json"


STATISTICS_FILE = "esm_statistics.safetensors"
