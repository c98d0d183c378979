pytest_plugins = ["prisma_core.conformance.pytest"]
