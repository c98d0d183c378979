"""Typed options of sources, for facts that a file lacks; checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prisma_core.errors import InputError
from prisma_core.errors.migration import check_keywords
from prisma_core.inputs import Mean, Std

Whole = Annotated[int, Field(strict=True, ge=1)]
Above = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Heads = Annotated[Whole | None, Field(description="a whole number of heads, at least 1")]
Eps = Annotated[Above | None, Field(description="a number above 0, such as 1e-6")]
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
Kind = TypeVar("Kind", bound="Options")


class Options(BaseModel):
    """Base of a source's options; each field's description says what is expected, as an error quotes it.

    Attributes:
        mean, std: of the images a model was trained on, per channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Annotated[Mean | None, Field(description="a number a channel, such as (0.485, 0.456, 0.406)")] = None
    std: Annotated[Std | None, Field(description="a number above 0 a channel, such as (0.229, 0.224, 0.225)")] = None

    def normalisation(self, where: object, channels: int, default: Pixels | None = None) -> Pixels | None:
        """Return mean and std of images, or None where neither is given and the default has not as many channels.

        Raises:
            InputError: there is one without the other, or another number of them than of channels.
        """
        mean, std = (values or (default and default[i]) for i, values in enumerate((self.mean, self.std)))
        if mean and std and len(mean) == len(std) == channels:
            return mean, std
        if self.mean is None and self.std is None:
            return None
        raise InputError(
            f"Expected mean and std, {channels} numbers each, for {where} takes {channels} channels; "
            f"got mean={self.mean}, std={self.std}."
        )


def read_options(kind: type[Kind], who: str, options: Mapping[str, Any]) -> Kind:
    """Return a source's options.

    Args:
        kind: what there is.
        who: what they were given to, for messages.
        options: by their names.

    Raises:
        InputError: there is none of a name, or a value of another kind.
    """
    check_keywords(who, options, kind.model_fields)
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        expected = kind.model_fields[name].description
        raise InputError(f"{who} expected {name}= to be {expected}; got {options[name]!r}.") from error
