import io
import tarfile
from pathlib import Path

import platformdirs
import pooch
import pytest

from tightrope.data import load
from tightrope.data.files import data_root
from tightrope.errors import DataError


def test_the_root_is_the_argument_else_the_variable_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTROPE_DATA", str(tmp_path / "variable"))
    assert data_root(tmp_path) == tmp_path
    assert data_root(None) == tmp_path / "variable"
    monkeypatch.delenv("TIGHTROPE_DATA")
    assert data_root(None) == platformdirs.user_cache_path("tightrope")


@pytest.mark.parametrize(
    ("name", "layouts", "publisher"),
    [
        ("mnist", ["MNIST/raw", "mnist", "train-images-idx3-ubyte"], "http://yann.lecun.com/exdb/mnist"),
        ("cifar10", ["cifar-10-batches-bin", "cifar-10-batches-py"], "https://www.cs.toronto.edu/~kriz/"),
    ],
)
def test_missing_data_says_where_it_looked_and_how_to_get_it(tmp_path, network, name, layouts, publisher):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    expected = [*(str(tmp_path / layout) for layout in layouts[:2]), *layouts, "TIGHTROPE_DATA", publisher]
    assert [part for part in expected if part not in message] == []
    assert f"Downloading {network[0]} failed: no route to host" in message


def test_nothing_is_downloaded_when_switched_off(tmp_path, network):
    with pytest.raises(DataError, match="switched off"):
        load("mnist", tmp_path, download=False)
    assert network == []


def test_nothing_is_downloaded_when_the_files_are_there(tmp_path, write, mnist_files, network):
    write(tmp_path, mnist_files)
    load("mnist", tmp_path)
    assert network == []


def test_an_incomplete_folder_counts_as_missing(tmp_path, write, mnist_files):
    del mnist_files["t10k-labels-idx1-ubyte"]
    write(tmp_path, mnist_files)
    with pytest.raises(DataError, match="was not found"):
        load("mnist", tmp_path)


def test_missing_mnist_is_downloaded_with_its_checksums(tmp_path, monkeypatch, mnist_files):
    hashes = []

    def retrieve(url, known_hash, fname, path, **_):
        hashes.append(known_hash)
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(mnist_files[fname.removesuffix(".gz")])

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(load("mnist", tmp_path).train) == 20
    assert hashes[2] == "md5:9fb629c4189551a2d022fa330f9573f3"
    assert len(list((tmp_path / "MNIST/raw").iterdir())) == 4


def test_missing_cifar10_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    def retrieve(url, fname, path, processor, **_):
        path.mkdir(parents=True)
        with tarfile.open(path / fname, "w:gz") as tar:
            folder = tarfile.TarInfo("cifar-10-batches-bin")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
                record = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                record.size = 3073
                tar.addfile(record, io.BytesIO(b"\x07" + bytes(3072)))
        processor(str(path / fname), "download", None)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert load("cifar10", tmp_path).train.y.tolist() == [7] * 5


@pytest.mark.parametrize(
    "failure", [ValueError("MD5 hash of downloaded file does not match"), PermissionError(13)]
)
def test_a_wrong_checksum_or_an_unwritable_root_is_a_data_error(tmp_path, monkeypatch, failure):
    def retrieve(url, path: Path, **_):
        raise failure

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(DataError, match="failed"):
        load("cifar10", tmp_path)


def test_a_download_that_leaves_files_out_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, "retrieve", lambda url, **_: None)
    with pytest.raises(DataError, match="files are still missing"):
        load("mnist", tmp_path)
