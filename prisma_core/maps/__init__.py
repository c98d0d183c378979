"""Tables that map upstream's tensors and places to canonical names."""
