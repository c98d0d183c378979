"""DINO, DINOv2 and DINOv3 for Prisma."""
