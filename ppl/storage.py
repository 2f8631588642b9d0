"""Files that are whole or absent: atomic writes, a checksum of content, JSON and tensors without pickle.

digest = SHA-256(JSON text, then for each name in order: name, dtype, shape, bytes)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl.errors import CheckpointError, OptionError

__all__ = ["atomic_path", "decode_json", "digest", "dtype_name", "encode_json", "load_tensors", "save_tensors"]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as it is written to a file: "float32", not "torch.float32"."""
    return str(dtype).removeprefix("torch.")


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of named tensors: their names, dtypes, shapes and bytes, in the order of names.

    Example:
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)})
        True
        >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2, 1)})
        False
    """
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        head = json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)])
        total.update(head.encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def encode_json(value: Any, where: str = "value") -> str:
    """JSON text of plain data; tuples, complex numbers, tensors and keys that are not strings survive.

    Args:
        value: None, bool, int, float, str, complex, small tensors, and lists, tuples and dicts of them.
        where: how an error names the value.

    Raises:
        OptionError: for a value of another type, with the place where it sits.

    Example:
        >>> decode_json(encode_json({"shape": (2, 3), 5: None}))
        {'shape': (2, 3), 5: None}
    """
    return json.dumps(_plain(value, where), sort_keys=False)


def decode_json(text: str) -> Any:
    """The inverse of `encode_json`."""
    return _rich(json.loads(text))


def _plain(value: Any, where: str) -> Any:
    """JSON-ready form; `{"$": kind, "v": ...}` marks what JSON itself cannot say."""
    if value is None or isinstance(value, bool | int | float | str):
        # Subclasses (numpy floats, string enums) are written as what they are numerically.
        return value
    if isinstance(value, list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$": "tuple", "v": [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, complex):
        return {"$": "complex", "v": [value.real, value.imag]}
    if isinstance(value, Tensor):
        real = torch.view_as_real(value) if value.is_complex() else value
        return {"$": "tensor", "dtype": dtype_name(value.dtype), "shape": list(real.shape), "v": real.tolist()}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and "$" not in value:
            return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [[_plain(key, where), _plain(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {"$": "dict", "v": pairs}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item(), where)
    raise OptionError(
        f"{where} is a {type(value).__name__}, which has no safe form in a file; expected None, numbers, text, "
        "tensors, or lists, tuples and dicts of them: convert it first, for instance with str()"
    )


def _rich(value: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_rich(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get("$"):
        case None:
            return {key: _rich(item) for key, item in value.items()}
        case "tuple":
            return tuple(_rich(item) for item in value["v"])
        case "complex":
            return complex(*value["v"])
        case "tensor":
            dtype = getattr(torch, value["dtype"])
            parts = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
            real = torch.tensor(value["v"], dtype=parts).reshape(value["shape"])
            return torch.view_as_complex(real) if dtype.is_complex else real
        case _:
            return {_rich(key): _rich(item) for key, item in value["v"]}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well; a kill leaves the old file whole.

    Folders that are missing on the way are made: what took hours must not be lost to a path.

    Raises:
        IsADirectoryError: the path is a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Any) -> None:
    """Write named tensors and plain data to one safetensors file, atomically, with a checksum.

    Args:
        path: file to write; an existing one is replaced.
        tensors: any dtype and shape; written from the CPU.
        meta: plain data for the JSON header (see `encode_json`).
    """
    from safetensors.torch import save

    pack: dict[str, Tensor] = {}
    seen: set[int] = set()
    complex_names = []
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if flat.is_complex():
            # The format has no complex128.
            complex_names.append(name)
            flat = torch.view_as_real(flat)
        storage = flat.untyped_storage().data_ptr()
        # The format refuses tensors that share memory; a view may also sit in a much larger storage.
        pack[name] = flat.clone() if storage in seen else flat
        seen.add(storage)
    text = encode_json({"meta": meta, "complex": complex_names}, "header")
    header = {"pilotlight": text, "sha256": digest(tensors, text)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(pack, metadata=header))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read a file of `save_tensors`, and check it.

    Returns:
        The tensors, on the CPU, and the plain data.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or was not written by `save_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or is not a safetensors file ({error}); delete it") from error
    if "pilotlight" not in header:
        raise CheckpointError(f"{path} was not written by this toolkit: its header is missing; give another path")
    try:
        content = decode_json(header["pilotlight"])
        for name in content["complex"]:
            tensors[name] = torch.view_as_complex(tensors[name])
        found = digest(tensors, header["pilotlight"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the header of {path} is damaged ({error}); delete the file") from error
    if found != header.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; delete it and run again")
    return tensors, content["meta"]
