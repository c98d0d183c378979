"""What all tests share: the conformance kit's report at the end of the run."""

pytest_plugins = ["prisma_core.conformance.pytest"]
