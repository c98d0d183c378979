"""Hook maps of models that keep upstream's own form."""
