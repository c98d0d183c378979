"""Tools that adapters of several libraries share."""
