"""Upstream's own modules: hooked where they stand, copied, and checked for behaviour that no tensor shows."""
