"""What is installed: every file but torch by its hash, known vulnerabilities (pip-audit), licences (pip-licenses).

Both tools run in an environment of their own. pip-audit asks the package index for advisories; releases that it has no word
of count as not audited. All licences are in [licences.md](licences.md).
"""

import json
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path
from typing import Any

from dynprune.atomic import replacing

_LOCK = Path("requirements.lock")
_ENVIRONMENT = Path("build/trust/audit")
_TOOLS = ("pip-audit==2.10.1", "pip-licenses==5.5.5")
# Licences that ask something of who passes the software on beside naming its authors.
_COPYLEFT = ("GPL", "General Public", "MPL", "Mozilla", "EPL", "EUPL", "CDDL")


def run(folder: Path) -> dict[str, Any]:
    """Audits what the lock names and lists the licences of what is installed.

    Args:
        folder: Where the list of licences goes.

    Returns:
        The figures of the report.
    """
    if not (_ENVIRONMENT / "bin/pip-licenses").exists():
        venv.create(_ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([_ENVIRONMENT / "bin/pip", "install", "-q", "--disable-pip-version-check", *_TOOLS], check=True)
    licences = json.loads(_said("pip-licenses", f"--python={sys.executable}", "--format=json", "--from=mixed"))
    named = {
        f"{one['Name']} {one['Version']}": next(line.strip() for line in one["License"].splitlines() if line.strip())
        for one in licences
        if one["Name"] != "dynprune"
    }
    rows = [f"| {name} | {licence} |" for name, licence in sorted(named.items(), key=lambda item: item[0].lower())]
    with replacing(folder / "licences.md") as path:
        path.write_text("\n".join(["# Licences", "", "| package | licence |", "| --- | --- |", *rows]) + "\n", encoding="utf-8")
    audit = _said("pip-audit", f"--requirement={_LOCK}", "--require-hashes", "--disable-pip", "--format=json")
    audited = json.loads(audit)["dependencies"]
    known = [one for one in audited if "skip_reason" not in one]
    return {
        "dependencies_locked": len(audited),
        "dependencies_audited": len(known),
        "vulnerabilities": [f"{one['name']} {one['version']}: {bug['id']}" for one in known for bug in one["vulns"]]
        if known
        else "not known: the package index that was asked has no advisories",
        "licences": len(set(named.values())),
        "copyleft": [f"{name} ({licence})" for name, licence in named.items() if any(word in licence for word in _COPYLEFT)],
        "without_licence": [name for name, licence in named.items() if licence == "UNKNOWN"],
        "licences_most_often": dict(Counter(named.values()).most_common(5)),
    }


def _said(tool: str, *arguments: str) -> str:
    """What a tool prints; pip-audit ends with 1 where it finds something."""
    done = subprocess.run([_ENVIRONMENT / "bin" / tool, *arguments], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise RuntimeError(f"{tool} said nothing: {done.stderr[-1000:]}")
    return done.stdout
