"""The systems of the papers, each a recipe over the same network: which frames, which loss, and how sampling goes on.

A recipe is one file here with a subclass of `mimo.recipes.base.Recipe`, and one row in RECIPES; MiMoConfig.recipe names
it. Nothing is imported before it is asked for, so that reading a config needs no torch.
"""

from __future__ import annotations

import importlib

RECIPES = {  # name: module and class
    "mimo": "mimo.recipes.mimo:MaskedHistory",
    "acdit": "mimo.recipes.acdit:ACDiT",
    "dfot": "mimo.recipes.dfot:DiffusionForcing",
    "far": "mimo.recipes.far:FAR",
    "far_long": "mimo.recipes.far_long:FARLong",
    "video_dit": "mimo.recipes.video_dit:VideoDiT",
    "magi": "mimo.recipes.magi:MAGI",
    "videomar": "mimo.recipes.videomar:VideoMAR",
}


def recipe_type(config):
    """The recipe of a config, a subclass of Recipe."""
    module, name = RECIPES[config.recipe].split(":")
    return getattr(importlib.import_module(module), name)


def build_recipe(
    config, *, unmasked_from: int | None = None, own_history_from: int | None = None, backend: str = "auto"
):
    """The objective of a config, see `mimo.recipes.base.Recipe`."""
    options = {"unmasked_from": unmasked_from, "own_history_from": own_history_from, "backend": backend}
    return recipe_type(config)(config, **options)
