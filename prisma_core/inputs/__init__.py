"""From images to the tensor a model takes, and checks of that tensor."""

from prisma_core.inputs.facts import Mean, Preprocess, Std
from prisma_core.inputs.forms import ImagePreprocess, restored
from prisma_core.inputs.opening import ImageLike, open_image
from prisma_core.inputs.probes import SIZES, fingerprint, probe

__all__ = [
    "SIZES",
    "Mean",
    "ImageLike",
    "ImagePreprocess",
    "Preprocess",
    "Std",
    "fingerprint",
    "open_image",
    "probe",
    "restored",
]
