"""Files appear whole or not at all, and JSON tells when it was changed."""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from bench.errors import BenchError

# Added to every JSON object that is written: the hash of all the rest.
SEAL = "content_sha256"
# PyYAML lets what its constructors of dates, numbers and truth values raise pass.
YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError)
UNWRITABLE = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it.

    Raises:
        BenchError: it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except UNWRITABLE as error:
        raise BenchError(f"{folder} cannot be made: {error.strerror}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    Raises:
        BenchError: the folder cannot be made, or takes no such file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except UNWRITABLE as error:
        if str(error.filename) not in map(str, (temporary, *path.parents)):
            raise
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        # Where nothing could be written nothing is left, and the error above says why.
        with suppress(*UNWRITABLE):
            temporary.unlink()


def share(path: Path) -> None:
    """Give `path` the mode of any other file; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs from writing several files of `folder` at the same time.

    Raises:
        BenchError: one does so now.
    """
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path) -> None:
    """Lock the open file or folder at `path` until it is closed.

    Raises:
        BenchError: another run has locked it, or its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BenchError(f"{path} is being written by another run: wait, or stop it") from None
    except OSError as error:
        raise BenchError(
            f"{path} cannot be locked ({error.strerror}): put results on a file system with flock"
        ) from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` and its seal as indented JSON, atomically."""
    # As it will be read: keys become text.
    plain = json.loads(json.dumps(value))
    with atomic_write(path) as temporary:
        text = json.dumps({**plain, SEAL: sha256_json(plain)}, indent=2)
        temporary.write_text(text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; one without a seal was written by hand.

    Raises:
        BenchError: the file is missing, is not a JSON object or was changed.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise BenchError(f"{path} is missing: run the step that writes it") from None
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is not valid JSON ({error}): delete it and rerun") from None
    if not isinstance(value, dict):
        raise BenchError(f"{path} must hold a JSON object: delete it and rerun")
    if SEAL in value and value.pop(SEAL) != sha256_json(value):
        raise BenchError(f"{path} was changed after it was written: delete it and rerun")
    return value


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a merged one's keys may be given again."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"{key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read plain values from a YAML file.

    Raises:
        BenchError: the file cannot be read, is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(path.read_text(), Loader=_UniqueKeys)
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise BenchError(f"{path} is not valid YAML: it is nested too deeply") from None
    except YAML_ERRORS as error:
        raise BenchError(f"{path} is not valid YAML: {error}") from None


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
