"""Which upstream tensor, and which upstream place, is which of ours."""
