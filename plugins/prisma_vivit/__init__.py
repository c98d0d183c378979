"""Video transformers for Prisma."""
