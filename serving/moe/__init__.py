"""The fused W4AFP8 MoE layer for Hopper GPUs: int4 weights, FP8 activations and tensor cores, one call a layer.

    routing (x to FP8, pairs by expert) -> gate_up (w13, SiLU and mul, to FP8) -> down (w2) -> combine

`layer.FusedExperts` is the way in; `packing` is the weights' layout, `tuning` which tiles run at which size. The
kernels are Triton; nothing here is imported where triton is not installed.

Shape suffixes: T tokens, K chosen experts a token, P = T * K (token, expert) pairs, E this rank's experts, H hidden
size, I this rank's intermediate size, G groups of 128.
"""
