"""Where the weights of a base come from."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class BaseOrigin:
    """Where a trunk's base weights can be loaded from, and what identifies them.

    `identity` is the SHA-256 of the weight files, or the commit of a Hub model: adapters trained on
    a base fit this identity, wherever its folder lies.
    """

    path: str
    identity: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the base is a folder (known by a hash), not a Hub model (known by its name)."""
        return re.fullmatch("[0-9a-f]{64}", self.identity) is not None
