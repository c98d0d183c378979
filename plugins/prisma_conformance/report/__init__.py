"""Results, certificates, and the table of supported models."""
