"""Checkpoint to quantized checkpoint: plan, calibrate, quantize, verify."""
