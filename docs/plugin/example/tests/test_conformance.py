from prisma_conformance.pytest import suite
from prisma_torchvision import TorchvisionSource

source = TorchvisionSource()
every = [source.case(info.reference.partition(":")[2]) for info in source.models()]

test_conformance = suite("torchvision")
test_images = suite("torchvision", checks="preprocess", cases=every)
