"""The parity doctor."""
