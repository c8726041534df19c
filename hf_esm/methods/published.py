"""Settings of the published code of ESM and ESM++ (arXiv 2602.20208, 2606.19164), and the weights that it names.

The code names the weights of two architectures. Here patterns name the same weights in every family of Transformers.
"""

from typing import Any


# Module that holds an attention's maps: `self_attn`, `crossattention`, `SelfAttention`, `attentions.0`, …
_ATTENTION = r"(?i)att(n|ention)?[^.]*(\.self)?(\.\d+)*\."


# The map that leads out of an attention, inside of that module.
ATTENTION_OUTPUTS = (
    _ATTENTION
    + r"((layout_)?output\.dense|dense|(layout_|attention_)?out(put)?|o|o_([ab]_)?proj|out_lin"
    + r"|out(put)?_((text|vision)_)?proj|output_projection\.o_proj|c_proj|final|linear_out|post(_proj)?"
    + r"|proj(ection(_layer)?)?|to_out|wo)(\.linear)?\.weight$"
)


# The same map where its module has no such name, and the maps from a tower to what both towers have in common.
OTHER_OUTPUTS = r"(^|(?<!mlp)\.)(o_proj|out_proj|(visual|text)_projection)\.weight$"


# The maps that an attention reads its input with: q, k and v, separate or in one.
_QUERIES_KEYS_VALUES = (
    _ATTENTION
    + r"(in_proj|c_attn|att_proj|w?qkv(_proj)?|query_key(_value)?|w?[qkv]|(query|key|value)(_proj|_global)?"
    + r"|([qkv]|kv)_(proj|lin|head)|linear_[qkv]|(project|projection)_(query|key|value|[qkv])|to_([qkv]|kv|query|key)"
    + r")(\.linear)?\.weight$"
)


# The first map of an MLP in a block, with its gate.
_FIRST_OF_MLP = (
    r"(?i)\.\d+\.(.*\.)?(fc1|fc_in|c_fc|(linear_)?fc1|lin_?1|linear_?1|layer_1|dense_?1|dense_h_to_4h|wi(_\d)?|w[13]"
    r"|weights_in|(intermediate|intermediate_query|layout_intermediate)\.dense|intermediate_dense|ffn"
    r"|(up|gate|gate_up)_proj|proj_up(_gate)?|pw_?conv1|pointwise_conv1)(\.linear)?\.weight$"
)


# The linear maps inside of blocks.
_IN_BLOCKS = r"(^|\.)\d+\.(.*\.)?weight$"


# What both published codes have in common.
_PUBLISHED: dict[str, Any] = {
    "gamma": 0.15,
    "layer_exponent": 2.0,
    "factor": 1.0,
    "rank_share": 1.0,
    "sum_subtracted": 0.0,
    "shrinkage": 0.0,
    "keep_singular_values": False,
    "match_norm": False,
    "tolerance": 0.0,
    "published_embeddings": True,
    "all_columns": True,
}


ROBERTA: dict[str, Any] = {
    **_PUBLISHED,
    "keep_fallback_scale": True,
    "scale_all": True,
    "base_biases": True,
    "largest_alpha": 5.0,
}


VIT: dict[str, Any] = {
    **_PUBLISHED,
    "factor": 2.0,
    "task_exponent": 2.0,
    "dimension_exponent": 2.0,
    "uncalibrated": (ATTENTION_OUTPUTS, OTHER_OUTPUTS),
    "stack_shared_inputs": True,
    "scale_fallback": False,
}


# Of ESM++, beside the settings of the static model.
_ROUTED: dict[str, Any] = {"router": "prototype", "static_method": "own", "expert_directions": "residual"}


ROUTED_ROBERTA: dict[str, Any] = {**ROBERTA, **_ROUTED, "targets": (_IN_BLOCKS,)}


ROUTED_VIT: dict[str, Any] = {**VIT, **_ROUTED, "targets": (_QUERIES_KEYS_VALUES, _FIRST_OF_MLP)}
