"""Hooked upstreams: upstream's own module with hook points, for models without a canonical form."""
