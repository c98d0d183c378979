"""The commands that come with the core, one module for each subject."""
