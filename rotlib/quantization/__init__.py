"""Quantization: grids for weights and activations, Hessians, GPTQ."""
