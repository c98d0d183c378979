"""A model in a folder."""
