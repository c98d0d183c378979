"""Adapters of models that become the canonical transformer."""
