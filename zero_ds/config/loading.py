"""Recipes: YAML files and dotted overrides, resolved to a checked `RunConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from zero_ds.config.schema import RunConfig, _read_yaml, registered_data
from zero_ds.runtime.errors import ConfigError, did_you_mean

RECIPE_ROOT = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes in the package, such as `smollm2-135m/encoder`."""
    return sorted(
        str(path.relative_to(RECIPE_ROOT).with_suffix(""))
        for path in RECIPE_ROOT.rglob("*.yaml")
        if path.stem != "common" and path.parent.name != "stages"
    )


def load_run(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """Resolves a recipe (name in the package, or path of a YAML file) and `key=value` overrides.

    Raises:
        ConfigError: unknown recipe or key (naming the nearest), a value of the wrong kind, unreadable YAML.
    """
    tree = _read_recipe(recipe)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}' is not an override; write key=value, e.g. optimizer.learning_rate=1e-4.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"the value of {key} cannot be read: {text!r}.") from None
        _set(tree, key.split("."), value)
    return validate(RunConfig, tree, what=f"recipe {recipe}")


def validate(model: type[Model], tree: Any, what: str) -> Model:
    """Checks a tree of plain values against a pydantic model, with one-sentence errors."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_explain(model, error)}") from None


Model = TypeVar("Model", bound=BaseModel)


def _read_recipe(recipe: str, beside: Path = Path(), seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe's tree, merged over those it extends; a file that it extends lies relative to the recipe's folder."""
    path = beside / recipe
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPE_ROOT / f"{recipe}.yaml"
        if not path.is_file():
            raise ConfigError(f"there is no recipe '{recipe}'{did_you_mean(recipe, recipe_names())}")
    if str(path.resolve()) in seen:
        raise ConfigError(f"recipe {recipe} extends itself.")
    tree = _read_yaml(path, what="recipe file")
    parents = tree.pop("extends", None) or []
    base: dict[str, Any] = {}
    for parent in parents if isinstance(parents, list) else [parents]:
        base = _merge(base, _read_recipe(str(parent), path.parent, (*seen, str(path.resolve()))))
    return _merge(base, tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {key for key, value in top.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return {**base, **top, **{key: _merge(base[key], top[key]) for key in both}}


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Puts a value at a dotted key; a number picks an entry of a list that is there, as in `data.sources.0.limit`."""
    node: Any = tree
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                name = ".".join(keys[:depth])
                raise ConfigError(f"{name} has entries 0 to {len(node) - 1}, and none called '{key}'.")
            place = int(key)
        if depth == len(keys) - 1:
            node[place] = value
            return
        nested = node[place] if isinstance(node, list) else node.get(place)
        if isinstance(node, list) and isinstance(nested, str):  # a registered data set, or a file, by its word
            nested = node[place] = {("name" if nested in registered_data() else "path"): nested}
        if not isinstance(nested, dict | list):
            nested = node[place] = {}
        node = nested


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{name}'{did_you_mean(location[-1], _keys(model, location[:-1]))}"
    if first["type"] == "missing":
        return f"'{name}' is missing; set it in the recipe or with {name}=VALUE."
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}={first['input']!r}: {message[0].lower()}{message[1:]}." if location else f"{message}."


def _keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """Field names of the section at `location`, looked up through the annotations."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        while not isinstance(current, type) or not issubclass(current, BaseModel):
            inner = [a for a in get_args(current) if a is not type(None) and a is not Ellipsis]
            if not inner:
                return []
            current = inner[-1] if get_origin(current) is dict else inner[0]
    return list(current.model_fields)
