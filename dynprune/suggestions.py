"""The nearest names of what was mistyped on the command line: Hydra says what is wrong, and this what was meant."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

# How alike two names must be, 0..1.
_LIKENESS = 0.6


def suggestions(arguments: Sequence[str], folder: Path) -> list[str]:
    """What may have been meant by the options and keys that there are not.

    Args:
        arguments: What was typed after the command.
        folder: The folder of the configuration.

    Returns:
        A sentence for each mistyped name that is near an existing one; none where everything exists, or nothing is near.
    """
    typed = [argument for argument in arguments if not argument.startswith(("-", "hydra")) and "=" in argument]
    try:
        return _suggested(OverridesParser.create().parse_overrides(typed), [folder, *_own_folders(arguments)])
    except HydraException:
        # What cannot even be read, or composed with what is right, has no nearest name: Hydra has shown the place.
        return []


def _suggested(overrides: Sequence[Override], folders: Sequence[Path]) -> list[str]:
    options = _options(folders)
    choices = [override for override in overrides if override.key_or_group in options and not override.is_add()]
    wrong = {override.key_or_group for override in choices if not set(_values(override)) <= options[override.key_or_group]}
    said = [
        f"{override.key_or_group}={value}: did you mean {override.key_or_group}={near}?"
        for override in choices
        for value in _values(override)
        if value not in options[override.key_or_group] and (near := _nearest(value, options[override.key_or_group]))
    ]
    others = [o for o in overrides if o.key_or_group not in options and not o.is_add() and not o.is_force_add()]
    known = {*_keys(_composed(folders, [o for o in choices if o.key_or_group not in wrong])), *options} if others else set()
    for override in others:
        key = override.key_or_group
        # A key may be one that a value of its group brings, and that value is wrong already.
        unknown = key not in known and key.partition(".")[0] not in wrong
        if unknown and (near := _nearest(key, known)):
            said.append(f"{key}: did you mean {near}?")
    return said


def _own_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders of one's own configuration, after ``-cd`` or ``--config-dir``."""
    return [Path(place) for flag, place in itertools.pairwise(arguments) if flag in ("-cd", "--config-dir")]


def _options(folders: Sequence[Path]) -> dict[str, set[str]]:
    """By group, its options; a group in a group is an option with a slash, too."""
    found: dict[str, set[str]] = {}
    for place, path in ((folder, path) for folder in folders for path in folder.rglob("*.yaml")):
        parts = path.relative_to(place).with_suffix("").parts
        for depth in range(1, len(parts)):
            found.setdefault("/".join(parts[:depth]), set()).add("/".join(parts[depth:]))
    return found


def _values(override: Override) -> list[str]:
    """The options that are typed, several in a sweep."""
    if override.is_sweep_override() and not override.is_choice_sweep():
        # A pattern, or a range, of which every value is there.
        return []
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    return [str(value) for value in values if value is not None]


def _composed(folders: Sequence[Path], choices: Iterable[Override]) -> DictConfig:
    """The configuration with the first option of each choice."""
    first = [f"{override.get_key_element()}={_values(override)[0]}" for override in choices if _values(override)]
    GlobalHydra.instance().clear()
    own = ",".join(f"file://{place.resolve()}" for place in folders[1:])
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        return compose("config", overrides=[f"hydra.searchpath=[{own}]", *first, "paths.run=here"])


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        yield prefix + key
        value = config._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not OmegaConf.is_missing(config, key):
            yield from _keys(value, f"{prefix}{key}.")


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like another one, or ends like it; ``None`` where none is near."""
    names = sorted(names)
    near = get_close_matches(name, names, n=1, cutoff=_LIKENESS)
    if near:
        return near[0]
    # A key may stand in another place: max_queries for exploration.max_queries.
    last = name.rpartition(".")[2]
    ends = [other for other in names if other.rpartition(".")[2] == last]
    return min(ends, key=len) if ends else None
