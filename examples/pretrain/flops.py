"""Floating-point operations that a token needs, for MFU: those of the model, not those of the program.

As in PaLM (Chowdhery et al., 2022, appendix B): six for each weight that a token is multiplied with
(two forward, four backward), of K routed experts and the shared ones, plus causal attention, so half
of the square. What rematerialisation computes again does not count, nor does the look-up of a token.
"""

from __future__ import annotations

from examples.pretrain.config import ModelConfig

# Dense bfloat16 operations a second, by the name that JAX gives a device.
_PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}


def flops_per_token(model: ModelConfig, *, seq_len: int) -> float:
    """Operations for one token in a sequence of ``seq_len``, forward and backward."""
    return 6.0 * active_weights(model) + 3.0 * _attention_layers(model) * model.num_heads * (
        model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    ) * float(seq_len)


def active_weights(model: ModelConfig) -> int:
    """Weights of matrices that one token is multiplied with."""
    dense = 3 * model.hidden * model.dense_intermediate
    experts = model.top_k + model.num_shared_experts
    moe = model.hidden * model.num_experts + 3 * model.hidden * model.moe_intermediate * experts
    head = model.hidden * model.vocab_size
    num_moe = model.num_layers - model.num_dense_layers
    total = (
        model.num_layers * _attention_weights(model)
        + model.num_dense_layers * dense
        + num_moe * moe
        + head
    )
    if model.mtp:  # one more layer, which first joins two hidden states, and the head again
        total += _attention_weights(model) + moe + 2 * model.hidden**2 + head
    return total


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device; None if they are not known here."""
    return next((peak for name, peak in _PEAKS.items() if device_kind.startswith(name)), None)


def _attention_layers(model: ModelConfig) -> int:
    return model.num_layers + int(model.mtp)


def _attention_weights(model: ModelConfig) -> int:
    queries = model.num_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    values = model.num_heads * model.v_head_dim
    if model.q_lora_rank:
        to_queries = model.q_lora_rank * (model.hidden + queries)
    else:
        to_queries = model.hidden * queries
    compress = model.hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    expand = model.kv_lora_rank * model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)
    return to_queries + compress + expand + values * model.hidden
