"""What all tests share: one thread for each worker, and the conformance kit's report at the end of the run."""

import torch

pytest_plugins = ["prisma_core.conformance.pytest"]

# Workers share the cores, and the models are tiny: more threads only wait for each other.
torch.set_num_threads(1)
