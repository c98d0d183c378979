"""Upstream's own module, hooked."""
