"""Resolves recipes (YAML files) and dotted overrides to a checked `RunConfig`.

A recipe is one YAML file that describes a whole run. `extends:` names recipes that it starts from; later ones win. An
unknown key, at any depth, is an error that names the nearest known one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from zero_ds.config.datasets import registered_datasets
from zero_ds.config.schema import RunConfig
from zero_ds.config.yaml_files import read_value, read_yaml
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.trust import allow_code

RECIPE_ROOT = Path(__file__).parent / "recipes"
TEMPLATE_ROOT = RECIPE_ROOT / "templates"
"""Folder of the chat templates that `data.chat_template` can name."""


def recipe_names() -> list[str]:
    """Returns the names of all recipes in the package, such as `smollm2-135m/encoder`."""
    return sorted(
        str(path.relative_to(RECIPE_ROOT).with_suffix(""))
        for path in RECIPE_ROOT.rglob("*.yaml")
        if path.stem != "common" and path.parent.name != "stages"
    )


def load_run(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """Resolves a recipe, which is a name in the package or the path of a YAML file, and `key=value` overrides.

    With trust_remote_code in it, this process may run code of model folders from then on.

    Raises:
        ConfigError: An unknown recipe or key, a value of the wrong kind, or YAML that cannot be read.
    """
    tree = _read_recipe(recipe)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}' is not an override; write key=value, e.g. optimizer.learning_rate=1e-4.")
        _set(tree, key.split("."), read_value(key, text))
    config = validate(RunConfig, tree, what=f"recipe {recipe}")
    if config.trust_remote_code:
        allow_code(True)
    return config


def validate(model: type[Model], tree: Any, what: str) -> Model:
    """Checks a tree of plain values against a pydantic model.

    Raises:
        ConfigError: A value that does not fit; one sentence, in which `what` names the tree.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_explain(model, error)}") from None


Model = TypeVar("Model", bound=BaseModel)


def _read_recipe(recipe: str, folder: Path = Path(), seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the tree of a recipe, merged over the recipes that it extends.

    Paths are relative to `folder`, which is the folder of the extending recipe; `seen` are the recipes on the way here.
    """
    path = folder / recipe
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPE_ROOT / f"{recipe}.yaml"
        if not path.is_file():
            raise ConfigError(f"unknown recipe '{recipe}'{did_you_mean(recipe, recipe_names())}")
    if str(path.resolve()) in seen:
        raise ConfigError(f"recipe {recipe} extends itself.")
    tree = read_yaml(path, what="recipe file")
    parents = tree.pop("extends", None) or []
    if not isinstance(parents, list):
        parents = [parents]
    base: dict[str, Any] = {}
    for parent in parents:
        base = _merge(base, _read_recipe(str(parent), path.parent, (*seen, str(path.resolve()))))
    return _merge(base, tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merges two trees: sections are merged key by key, everything else in `top` replaces what `base` has."""
    merged = {**base, **top}
    for key, value in top.items():
        replaced = base.get(key)
        if isinstance(value, dict) and isinstance(replaced, dict):
            merged[key] = _merge(replaced, value)
    return merged


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets the value of a dotted key. A number selects an entry of an existing list, as in `data.sources.0.limit`.

    Raises:
        ConfigError: A list that does not have such an entry.
    """
    node: Any = tree
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
                name = ".".join(keys[:depth])
                raise ConfigError(f"{name} has entries 0 to {len(node) - 1}, and none called '{key}'.")
            place = int(key)
        if depth == len(keys) - 1:
            node[place] = value
            return
        nested = node[place] if isinstance(node, list) else node.get(place)
        if isinstance(node, list) and isinstance(nested, str):  # a source that is given as a name or a path alone
            kind = "name" if nested in registered_datasets() else "path"
            nested = node[place] = {kind: nested}
        if not isinstance(nested, dict | list):
            nested = node[place] = {}
        node = nested


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """Returns the first error of a validation as one sentence."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    others: list[str] = []
    if location and location[-1].startswith("literal["):  # a word or something else: an error for each of them
        location = location[:-1]
        same = [one["msg"] for one in error.errors() if [str(part) for part in one["loc"][:-1]] == location]
        others = [message.removeprefix("Input should be ") for message in same[1:]]
    name = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{name}'{did_you_mean(location[-1], _keys(model, location[:-1]))}"
    if first["type"] == "missing":
        return f"'{name}' is missing; set it in the recipe or with {name}=VALUE."
    message = ", or ".join([first["msg"].removeprefix("Value error, ").removesuffix("."), *others])
    if not location:
        return f"{message}."
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        text = str(first["input"])
        return f"{name}={text} is not a text; if you mean the text {text}, write {name}='\"{text}\"'."
    end = "."
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        near = did_you_mean(first["input"], re.findall(r"'([^']*)'", message))
        end = near if near.endswith("?") else "."
    return f"{name}={first['input']!r}: {message[0].lower()}{message[1:]}{end}"


def _keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """Returns the field names of the section at `location`, found through the annotations."""
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
