"""What all tests share: one thread for each worker."""

import torch

# Workers share the cores, and the models are tiny: more threads only wait for each other.
torch.set_num_threads(1)
