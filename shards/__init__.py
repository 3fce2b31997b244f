"""Data on disk and its way to a batch: knows no model."""
