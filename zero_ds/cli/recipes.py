"""`zero-ds recipes`: the runs that come with the package."""

from __future__ import annotations


def recipes() -> None:
    """List the recipes that come with zero-ds, and the DeepSpeed configs that `zero=` can name."""
    from zero_ds.config.loading import recipe_names
    from zero_ds.training.deepspeed import ds_config_names

    print("\n".join(recipe_names()))
    print(f"zero= {' '.join(ds_config_names())}")
