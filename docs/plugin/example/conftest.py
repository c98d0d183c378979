pytest_plugins = ["prisma_conformance.pytest"]
