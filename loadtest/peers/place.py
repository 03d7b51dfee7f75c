"""Where peers and their models are: one folder that `loadtest peers` fills."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loadtest.peers.child import Skipped

DEFAULT = Path("~/.cache/pressgate-peers")
INSTALL = "python -m loadtest peers"


@dataclass(frozen=True, slots=True)
class Place:
    """The folder's parts; what is asked for and not there raises `Skipped` with the command that
    would install it."""

    root: Path

    @property
    def models(self) -> Path:
        """Checkpoints and their conversions."""
        return self.root / "models"

    @property
    def cache(self) -> Path:
        """Our own levels."""
        return self.root / "levels"

    @property
    def llama(self) -> Path:
        """The folder of llama.cpp's binaries."""
        folder = self.root / "llama.cpp" / "bin"
        if not (folder / "llama-bench").is_file():
            raise Skipped(f"llama.cpp: not in {self.root}; `{INSTALL}` builds it")
        return folder

    def python(self, package: str) -> Path:
        """The peers' Python, when it has `package`."""
        python = self.root / "venv" / "bin" / "python"
        site = self.root / "venv" / "lib"
        if not python.exists() or not any(site.glob(f"python3*/site-packages/{package}")):
            raise Skipped(f"{package}: not in {self.root}; `{INSTALL}` installs it")
        return python
