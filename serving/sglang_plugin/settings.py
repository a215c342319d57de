"""What the environment asks of the plugin: LIGHTSHIP_MOE and LIGHTSHIP_MOE_ACTIVATIONS."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from lightship.errors import ServingError

MOE = "LIGHTSHIP_MOE"
ACTIVATIONS = "LIGHTSHIP_MOE_ACTIVATIONS"
MODES = ("auto", "on", "off")
ACTIVATION_SCALES = ("dynamic", "static")


@dataclass(frozen=True)
class Settings:
    """How the plugin is to act.

    mode: `off` leaves SGLang as it is; `on` takes every W4AFP8 layer or ends the server; `auto` takes what it can.
    activations: `dynamic` finds an FP8 scale for each token; `static` uses the checkpoint's input scales.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    activations: Literal["dynamic", "static"] = "dynamic"

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings":
        """The settings in `environment`; what is not there, or empty, has its default.

        Raises:
            ServingError: an unknown value.
        """
        return cls(
            cast(Literal["auto", "on", "off"], _one_of(environment, MOE, MODES)),
            cast(Literal["dynamic", "static"], _one_of(environment, ACTIVATIONS, ACTIVATION_SCALES)),
        )


def _one_of(environment: Mapping[str, str], name: str, values: tuple[str, ...]) -> str:
    value = environment.get(name) or values[0]
    if value not in values:
        raise ServingError(f"{name}={value}: set it to one of {', '.join(values)}, or unset it for {values[0]}")
    return value
