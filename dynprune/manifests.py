"""The manifest of an artifact: the file that says what made it, with which releases, and what that took."""

import hashlib
import json
import platform
import resource
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from dynprune.atomic import NOTES, replacing, sha256

MANIFEST = "manifest.json"
# The key of a manifest's hash of itself.
_OWN = "sha256"

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
        ValueError: It is missing, no JSON object, lacks a key, or is not what was written; what was written before manifests
            had a hash of their own passes.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise broken(path, "is missing") from None
    except ValueError as error:
        raise broken(path, f"is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise broken(path, "is not a JSON object")
    if content.pop(_OWN, own_hash := _hash(content)) != own_hash:
        raise broken(path, "is not what was written")
    if absent := [key for key in keys if key not in content]:
        raise broken(path, f"lacks {', '.join(absent)}")
    return content


def broken(path: Path, why: str, folder: Path | None = None) -> ValueError:
    """What to raise for a file of an artifact, usually its manifest, that says nothing to rely on."""
    return ValueError(
        f"{path} {why}, so this folder cannot be trusted: delete it (rm -r {folder or path.parent}) and run the same "
        "command again, which makes it anew."
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder with a hash of its own, as a whole or not at all."""
    with replacing(folder / MANIFEST) as temporary:
        whole = {**manifest, _OWN: _hash(manifest)}
        temporary.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, its own hash left out."""
    content = {key: value for key, value in manifest.items() if key != _OWN}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder but its manifest and the notes of building it, by its path in the folder."""
    apart = (folder / MANIFEST, folder / NOTES)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in apart)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


@cache
def check_content(folder: Path, written: int) -> None:
    """Checks that the files of an artifact are those that were written; once in a process.

    Args:
        folder: The artifact's folder; what was made before manifests had hashes passes.
        written: When its manifest was last written, in nanoseconds: another one is checked anew.

    Raises:
        ValueError: A file is missing, or differs.
    """
    for name, expected in read_manifest(folder / MANIFEST, ()).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise broken(path, "is missing", folder)
        if sha256(path) != expected:
            raise broken(path, "is not what was written", folder)


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
