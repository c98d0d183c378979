"""From pictures to the tensor a model takes."""

from prisma_core.preprocess.facts import Mean, Preprocess, Std
from prisma_core.preprocess.forms import PicturePreprocess, restored
from prisma_core.preprocess.opening import Picture, open_picture
from prisma_core.preprocess.probes import SIZES, probe, tried

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
