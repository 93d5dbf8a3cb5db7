"""Quantization: grids, packing and packed linears shared by all systems, and one file per system."""
