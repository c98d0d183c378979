from prisma_torchvision import TorchvisionSource

from prisma_core.conformance.pytest import suite

source = TorchvisionSource()
every = [source.case(info.reference.partition(":")[2]) for info in source.models()]

test_conformance = suite("torchvision")
test_pictures = suite("torchvision", checks="preprocess", cases=every)
