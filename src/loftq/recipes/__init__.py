"""The paper's experiments as recipes: one YAML file a cell of its tables, with the published numbers beside the settings."""

from __future__ import annotations

from loftq.recipes.files import list_recipes, load_recipe
from loftq.recipes.recipe import Recipe

__all__ = ["Recipe", "list_recipes", "load_recipe"]
