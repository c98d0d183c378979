"""From images to the tensor a model takes."""

from prisma_core.inputs.facts import Mean, Preprocess, Std
from prisma_core.inputs.forms import PicturePreprocess, restored
from prisma_core.inputs.opening import Picture, open_picture
from prisma_core.inputs.probes import SIZES, probe, tried

__all__ = [
    "SIZES",
    "Mean",
    "Picture",
    "PicturePreprocess",
    "Preprocess",
    "Std",
    "open_picture",
    "probe",
    "restored",
    "tried",
]
