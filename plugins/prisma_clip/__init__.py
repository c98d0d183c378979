"""Dual encoders of pictures and texts for Prisma."""
