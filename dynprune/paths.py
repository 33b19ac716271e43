"""Where the configuration files are: beside the package once installed, in the repository in a checkout."""

import os
from pathlib import Path


def conf_dir() -> Path:
    """Find the folder with ``config.yaml`` and the configuration groups.

    Returns:
        The absolute path of the first that there is: the folder that ``DYNPRUNE_CONF`` in the environment
        names, ``conf`` inside the installed package, ``conf`` beside the package in a checkout. A
        ``DYNPRUNE_CONF`` that is set but wrong is an error: falling back would run something else than what
        was asked for.

    Raises:
        FileNotFoundError: None of them holds a ``config.yaml``.
    """
    package = Path(__file__).resolve().parent
    chosen = os.environ.get("DYNPRUNE_CONF")
    places = [Path(chosen).resolve()] if chosen else [package / "conf", package.parent / "conf"]
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    remedy = "set DYNPRUNE_CONF to a folder that has one, or unset it" if chosen else "install dynprune again"
    raise FileNotFoundError(
        f"no config.yaml found in $DYNPRUNE_CONF ({chosen or 'not set'}); without it, the places are "
        f"{package / 'conf'} and {package.parent / 'conf'}: {remedy}."
    )
