"""What tests ask about folders."""

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }
