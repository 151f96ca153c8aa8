"""ACDiT, the baseline of MiMo's experiments: clean history beside noisy future, nothing masked, L_diff alone.

Source: Hu et al. 2024, arXiv 2412.07720, as MiMo's App. E runs it.
"""

from __future__ import annotations

import dataclasses

from mimo.config import MiMoConfig
from mimo.recipes.base import NOTHING_MASKED
from mimo.recipes.mimo import MaskedHistory


class ACDiT(MaskedHistory):
    """Teacher forcing over whole frames; history as in MiMo."""

    @classmethod
    def check(cls, config: MiMoConfig) -> None:
        super().check(config)
        cls.require(config, **NOTHING_MASKED)


def acdit(config: MiMoConfig) -> MiMoConfig:
    """The baseline of a MiMo config: the same network without its decoder."""
    return dataclasses.replace(config, recipe="acdit", **NOTHING_MASKED)
