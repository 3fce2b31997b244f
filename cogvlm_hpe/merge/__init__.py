"""Adapters as factors: choose layers, scale, write; the dense model is never formed."""
