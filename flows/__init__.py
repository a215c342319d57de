"""Prefect flows: a release from checkpoint to promotion."""
