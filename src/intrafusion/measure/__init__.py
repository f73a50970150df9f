"""Measurements of networks, the compressed and the original alike."""
