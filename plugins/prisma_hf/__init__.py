"""transformers' plain vision transformers for Prisma."""
