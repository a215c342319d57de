"""Prefect flows: a release from checkpoint to promotion, and the experts' rounding on a cluster."""

import contextlib
from collections.abc import Iterator

from lightship.errors import LightshipError

CLUSTER_PACKAGES = {"prefect", "prefect_dask", "distributed"}


@contextlib.contextmanager
def needing_cluster_packages() -> Iterator[None]:
    """Around imports that a recipe with a cluster needs.

    Raises:
        LightshipError: one of CLUSTER_PACKAGES is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in CLUSTER_PACKAGES:
            raise
        raise LightshipError(
            f"the recipe asks for a cluster, which needs the package {error.name}: pip install 'lightship[cluster]'"
        ) from None
