"""Fashion-MNIST is the real one, splits are fixed, damage is found and repaired."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from bench.config import DataSettings
from bench.data import _download, _replace_all, data_folder, fetch, load_data, spread
from bench.errors import BenchError


def test_fashion_mnist_is_whole_and_its_splits_disjoint(fetched):
    data = load_data(DataSettings(name="fashion_mnist", directory=str(fetched.parent)))
    sizes = [len(split.labels) for split in (data.train, data.validation, data.test)]
    assert sizes == [55_000, 5_000, 10_000]
    assert not set(data.train.positions.tolist()) & set(data.validation.positions.tolist())
    assert data.test.labels.bincount().tolist() == [1000] * 10
    batch = data.train.batch(torch.tensor([5, 9]))
    assert batch.shape == (2, 1, 28, 28)
    assert batch.min() >= 0
    assert 0.5 < batch.max() <= 1
    again = load_data(DataSettings(name="fashion_mnist", directory=str(fetched.parent)))
    assert torch.equal(again.validation.positions, data.validation.positions)


@pytest.mark.fault(
    fault="tampered data file",
    stage="train, certify",
    outcome="named; fetching again repairs it",
)
def test_a_corrupt_file_is_named_and_fetch_repairs_it(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    settings = DataSettings(name="fashion_mnist")
    path = data_folder(settings) / "t10k-labels-idx1-ubyte"
    content, kept = path.read_bytes(), tmp_path / "kept"
    shutil.copytree(path.parent, kept)
    monkeypatch.setattr(
        "bench.data._debian_fashion_mnist", lambda folder: _replace_all(folder, kept)
    )
    path.write_bytes(content[:-1] + b"\x00")
    with pytest.raises(BenchError, match=r"t10k-labels-idx1-ubyte is missing or corrupt"):
        load_data(settings)
    fetch(settings)
    assert path.read_bytes() == content


def test_a_download_that_ends_early_leaves_no_file(tmp_path):
    class Short(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100" if "cut" in self.path else "10")
            self.end_headers()
            self.wfile.write(b"0123456789")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Short)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert _download(f"{address}/whole", tmp_path / "whole")
        assert not _download(f"{address}/cut", tmp_path / "cut")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_without_any_source_the_cure_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.data._debian_fashion_mnist", lambda folder: None)
    monkeypatch.setattr("bench.data._mirror_fashion_mnist", lambda folder: None)
    with pytest.raises(BenchError, match="put the four Fashion-MNIST files"):
        fetch(DataSettings(name="fashion_mnist", directory=str(tmp_path)))


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "image_folder" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return DataSettings(
        name="image_folder", directory=str(tmp_path), image_size=16, validation_images=2
    )


def test_any_image_folder_is_a_data_set(image_folder):
    fetch(image_folder)
    data = load_data(image_folder)
    assert (data.classes, data.shape) == (2, (3, 16, 16))
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert len(data.train.labels) == 6
    (data_folder(image_folder) / "train/cat/0.png").unlink()
    with pytest.raises(BenchError, match="changed since it was fetched"):
        load_data(image_folder)


def test_a_link_to_nothing_is_named(image_folder):
    link = data_folder(image_folder) / "train/cat/9.png"
    link.symlink_to("/nowhere/9.png")
    with pytest.raises(BenchError, match=r"cat/9\.png is no file"):
        fetch(image_folder)


def test_pixels_of_more_than_8_bits_are_refused_and_not_cut_off(image_folder):
    deep = np.full((20, 30), 40_000, np.uint16)
    Image.fromarray(deep).save(data_folder(image_folder) / "test/cat/0.png")
    fetch(image_folder)
    with pytest.raises(BenchError, match=r"test/cat/0.png has more than 8 bits"):
        load_data(image_folder).test.batch(torch.tensor([0]))


def test_classes_are_the_folders_that_do_not_hide(image_folder):
    for name in (".ipynb_checkpoints", "emu"):
        (data_folder(image_folder) / f"train/{name}").mkdir()
    hidden = data_folder(image_folder) / "train/.ipynb_checkpoints/0.png"
    Image.new("RGB", (40, 30)).save(hidden)
    fetch(image_folder)
    data = load_data(image_folder)
    assert data.classes == 3
    assert len(data.train.labels) == 6


def test_cifar_binaries_are_read_and_checked(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(10)
        rows.tofile(folder / name)
    settings = DataSettings(name="cifar10", directory=str(tmp_path), validation_images=10)
    fetch(settings)
    data = load_data(settings)
    assert data.shape == (3, 32, 32)
    assert data.test.labels.tolist() == list(range(10))
    expected = np.fromfile(folder / "test_batch.bin", np.uint8).reshape(10, 3073)[3, 1:]
    found = data.test.batch(torch.tensor([3])).flatten() * 255
    assert np.array_equal(found.round().numpy(), expected)
    (folder / "data_batch_2.bin").write_bytes(b"")
    with pytest.raises(BenchError, match=r"data_batch_2\.bin is missing or changed"):
        load_data(settings)


def test_test_images_are_evenly_spread():
    assert spread(10_000, 500).tolist() == list(range(0, 10_000, 20))
    assert spread(10, 7).tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert spread(900, 500).tolist()[-1] == 898
    assert len(spread(5, 100)) == 5
