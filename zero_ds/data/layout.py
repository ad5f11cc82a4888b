"""Chooses files of a data set's folder by subset and split, as the hub lays them out, and looks for missing shards."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from zero_ds.data.formats import DataError, named
from zero_ds.runtime.errors import did_you_mean

logger = logging.getLogger(__name__)

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
"""Usual names of splits."""
_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})(.*)")


def chosen(name: str, card: str | None, files: Sequence[str], subset: str | None, split: str | None) -> list[str]:
    """Returns the files of a subset and a split.

    name: The data set in messages. card: Text of its README.md, whose head may list subsets (`configs`). files: Paths
    below its folder, with `/`. Without a list in the card, a subset is a folder, and a split is a word of a path:
    `data/train-00000-of-00004.parquet`.

    Raises:
        DataError: There is no such subset or split.
    """
    listed = _configs(card)
    found: dict[str | None, list[str]] = {None: list(files)}
    if subset is not None:
        if subset in listed:
            found = _matching(listed[subset], files)
        else:
            folder = subset.strip("/") + "/"
            found = {None: [file for file in files if file.startswith(folder)]}
        if not any(found.values()):
            known = sorted({*listed, *(PurePosixPath(file).parts[0] for file in files if "/" in file)})
            raise DataError(f"{name} has no subset {named(subset)}{did_you_mean(subset, known)}")
    elif len(listed) == 1:
        found = _matching(next(iter(listed.values())), files)
    if split is None:
        everything = list(dict.fromkeys(file for group in found.values() for file in group))
        _warn_about_splits(name, everything)
        return everything
    if split in found:
        return found[split]
    everything = [file for group in found.values() for file in group]
    of_split = [file for file in everything if split in _words(file)]
    if not of_split:
        known = sorted({*(key for key in found if key), *_splits(everything)})
        raise DataError(f"{name} has no split {named(split)}{did_you_mean(split, known)}")
    return of_split


def check_shards(name: str, files: Iterable[str]) -> None:
    """Refuses a data set of which a shard is missing, by names such as `train-00002-of-00008.parquet`.

    Raises:
        DataError: Names the first shard that is missing.
    """
    found: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := _SHARD.fullmatch(file):
            start, number, total, end = match.groups()
            found[start, total, end].add(int(number))
    for (start, total, end), numbers in found.items():
        missing = sorted(set(range(int(total))) - numbers)
        if missing:
            shard = f"{start}-{missing[0]:0{len(total)}d}-of-{total}{end}"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"{name} is not complete: {shard}{more} is missing; fetch it again, or choose files with files="
            )


def _configs(card: str | None) -> dict[str, list[tuple[str | None, str]]]:
    """Returns the subsets that a card lists: for each, splits and patterns of files."""
    if not card or not card.startswith("---"):
        return {}
    try:
        head: Any = yaml.safe_load(card.split("---", 2)[1])
        configs = head.get("configs") or []
        return {str(each["config_name"]): _patterns(each) for each in configs if each.get("data_files")}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, IndexError):
        return {}


def _patterns(config: Any) -> list[tuple[str | None, str]]:
    entries = config["data_files"]
    folder = str(config.get("data_dir") or "").strip("/")
    found: list[tuple[str | None, str]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = (entry.get("split"), entry["path"]) if isinstance(entry, dict) else (None, entry)
        for path in paths if isinstance(paths, list) else [paths]:
            found.append((split, f"{folder}/{path}" if folder else str(path)))
    return found


def _matching(patterns: Sequence[tuple[str | None, str]], files: Sequence[str]) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = defaultdict(list)
    for split, pattern in patterns:
        plain = pattern.removeprefix("./").replace("**/", "*")
        found[split] += [file for file in files if fnmatch.fnmatchcase(file, plain) and file not in found[split]]
    return dict(found)


def _words(file: str) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9]+", file))


def _splits(files: Iterable[str]) -> set[str]:
    return {word for file in files for word in _words(file) if word in SPLITS}


def _warn_about_splits(name: str, files: Iterable[str]) -> None:
    splits = _splits(files)
    if len(splits) > 1:
        logger.warning("%s holds %s, and all of them are read; choose one with split", name, ", ".join(sorted(splits)))
