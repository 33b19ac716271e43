"""The manifest of an artifact: the file that says what made it, with which releases, and what that took."""

import json
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from dynprune.atomic import replacing

MANIFEST = "manifest.json"

# The packages whose release can change an artifact's content.
PACKAGES = (
    "dynprune",
    "torch",
    "transformers",
    "sentence-transformers",
    "lightning",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
)


def read_manifest(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a manifest.

    Args:
        path: The file.
        keys: What must be in it.

    Raises:
        ValueError: It is missing, no JSON object, or lacks a key.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise broken(path, "is missing") from None
    except ValueError as error:
        raise broken(path, f"is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise broken(path, "is not a JSON object")
    if absent := [key for key in keys if key not in content]:
        raise broken(path, f"lacks {', '.join(absent)}")
    return content


def broken(path: Path, why: str) -> ValueError:
    """What to raise for a manifest that says nothing to rely on."""
    return ValueError(
        f"{path} {why}, so this folder cannot be trusted: delete it (rm -r {path.parent}) and run the same "
        "command again, which makes it anew."
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, as a whole or not at all."""
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Releases of Python, of the platform and of the packages that are installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = installed_version(package)
        except PackageNotFoundError:  # A checkout that is run without being installed.
            continue
    return found


def peak_memory_mib() -> dict[str, float]:
    """The most memory that this process has held so far, in MiB, and that torch held on the current GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    torch = sys.modules.get("torch")  # A stage that never imported torch used no GPU.
    if torch is not None and torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return peak
