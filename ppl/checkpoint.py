"""A run on disk: one folder, one file per running or finished part, each written whole or not at all.

    run.checkpoint/  run.json   state-<part>.safetensors   finished-<part>.safetensors

`run.json` holds the format and the fingerprint of the run, so that a checkpoint is never continued by another program.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ppl.errors import CheckpointError
from ppl.storage import atomic_path, load_tensors, save_tensors

__all__ = ["Checkpoint"]

FORMAT = 1


class Checkpoint:
    """The folder of one run.

    Args:
        path: the folder; made at the first write.
        fingerprint: what the run is, as named hashes or texts ("program", "data", "backend", "seed", ...), or one text.

    Raises:
        CheckpointError: if the folder belongs to another run (it says which entries differ), to another format, or is
            not a checkpoint.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint = Checkpoint(Path(folder) / "run.checkpoint", {"program": "a1"})
        ...     checkpoint.write("state", "chain 0", {"x": torch.ones(2)}, {"step": 3})
        ...     tensors, meta = checkpoint.read("state", "chain 0")
        >>> meta["step"], tensors["x"].tolist()
        (3, [1.0, 1.0])
    """

    def __init__(self, path: str | Path, fingerprint: str | Mapping[str, str] = "") -> None:
        self.path = Path(path)
        entries = {"run": fingerprint} if isinstance(fingerprint, str) else fingerprint
        self.fingerprint = {str(name): str(value) for name, value in entries.items()}
        self._check_owner()

    def write(self, kind: str, part: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Store one part ("state" or "finished") with its header, replacing what was stored before."""
        if not (self.path / "run.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path / "run.json") as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "fingerprint": self.fingerprint}, indent=1))
        header = {"format": FORMAT, "part": part, "fingerprint": self.fingerprint, **meta}
        save_tensors(self._file(kind, part), tensors, header)

    def read(self, kind: str, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was stored under this name, or None.

        Raises:
            CheckpointError: if the file is damaged or comes from another run.
        """
        file = self._file(kind, part)
        if not file.exists():
            return None
        tensors, meta = load_tensors(file)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise CheckpointError(f"{file} has another format; delete the folder {self.path} and run again")
        self._compare(meta["fingerprint"], file)
        return tensors, meta

    def remove(self, kind: str, part: str) -> None:
        """Delete one part and the parts below it ("chain 0" takes "chain 0/warmup" along)."""
        self._file(kind, part).unlink(missing_ok=True)
        for file in self.path.glob(f"{kind}-{_slug(part + '/')}*.safetensors"):
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the whole checkpoint; files that are not ours stay, and then the folder too."""
        if not self.path.is_dir():
            return
        for pattern in ("state-*.safetensors", "finished-*.safetensors", ".*.part", "run.json"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _file(self, kind: str, part: str) -> Path:
        return self.path / f"{kind}-{_slug(part)}.safetensors"

    def _check_owner(self) -> None:
        """An existing folder must be a checkpoint of this very run."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise CheckpointError(f"a checkpoint is a folder, but {self.path} is a file; give another path")
        owner = self.path / "run.json"
        if not owner.exists():
            if all(file.name.endswith(".part") for file in self.path.iterdir()):
                return
            raise CheckpointError(f"{self.path} is not empty and is not a checkpoint; give another path")
        try:
            header = json.loads(owner.read_text())
            version, stored = header["format"], header["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{owner} is damaged ({error}); delete the folder {self.path} and run again"
            ) from error
        if version != FORMAT:
            raise CheckpointError(
                f"{self.path} has checkpoint format {version}, this version reads {FORMAT}; delete the folder, or "
                "finish the run with the version that began it"
            )
        self._compare(stored, self.path)

    def _compare(self, stored: Mapping[str, str], where: Path) -> None:
        """Name the entries of the fingerprint that differ."""
        names = sorted(stored.keys() | self.fingerprint.keys())
        differ = [name for name in names if stored.get(name) != self.fingerprint.get(name)]
        if differ:
            changes = "; ".join(
                f"{name}: stored {stored.get(name)!r}, now {self.fingerprint.get(name)!r}" for name in differ
            )
            raise CheckpointError(
                f"{where} is a checkpoint of another run ({changes}); run what it was made for, give another path, "
                f"or delete {self.path}"
            )


def _slug(part: str) -> str:
    """A readable file name that no two parts share: "/" becomes "+", a level that had to change gets a hash."""
    levels = []
    for level in part.split("/"):
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", level)[:40]
        levels.append(plain if plain == level else f"{plain}.{hashlib.sha256(level.encode()).hexdigest()[:8]}")
    return "+".join(levels)
