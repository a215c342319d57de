"""What recipes and policies are made of: strict sections, numbers in their ranges, and the TOML they are read from.

Users meet it as the message about a wrong key, `lightship plan DIR --recipe FILE`.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lightship.errors import RecipeError

Positive = Annotated[int, msgspec.Meta(gt=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part of a recipe."""


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a recipe or a policy; `what` says which, for the message.

    Raises:
        RecipeError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"the {what} {path} does not exist; recipes/ holds the shipped ones") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"the {what} {path} is not a TOML file: {error}") from error
