"""What a plugin implements: adapters, sources, cases, and the hooks of pluggy that yield them."""
