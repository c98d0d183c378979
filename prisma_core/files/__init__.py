"""Tensors from checkpoints and from the Hugging Face Hub, checked."""
