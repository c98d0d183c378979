"""Register tokens, and outliers that do without them for Prisma."""
