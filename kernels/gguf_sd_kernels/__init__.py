"""Dequantising kernels for GGML block formats: plain torch on any device, Triton on GPUs."""
