"""Processes and ranks: knows machines, not models."""
