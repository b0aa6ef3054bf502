"""Finding, fetching and reading the files of published data sets."""

from __future__ import annotations

import gzip
import os
import sys
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tightrope.errors import DataError


def data_root(root: Path | None) -> Path:
    """The folder that holds data sets: `root`, else `TIGHTROPE_DATA`, else the user's cache folder."""
    chosen = root or os.environ.get("TIGHTROPE_DATA") or platformdirs.user_cache_path("tightrope")
    return Path(chosen).expanduser().absolute()


def damaged(path: Path, what: str) -> DataError:
    """The error for a file whose content cannot be right."""
    return DataError(f"{path} is damaged: {what}. Delete it and load again to download it, or copy it anew")


def read(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzipped (by its first bytes, whatever its name).

    Raises:
        DataError: if it cannot be read or decompressed.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"it cannot be decompressed ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check the file and its permissions") from error


def _unpack(archive: str, _action: str, _pooch: object) -> None:
    """Write the files of a tar archive next to it, without their folders (a processor for pooch)."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if content := tar.extractfile(member):
                Path(archive).with_name(Path(member.name).name).write_bytes(content.read())


@dataclass(frozen=True)
class Download:
    """A file to fetch from `url` into `folder` below the root; a `.tar.gz` is unpacked there."""

    url: str
    md5: str
    folder: str


@dataclass(frozen=True)
class Publication:
    """How a published data set lies on disk and where it comes from.

    Args:
        name: its name.
        home: the publisher's page.
        layouts: what is accepted: one of some folders below the root, with all of some files, plain or `.gz`.
        downloads: what to fetch to get one of the layouts.
    """

    name: str
    home: str
    layouts: Sequence[tuple[Sequence[str], Sequence[str]]]
    downloads: Sequence[Download]

    def locate(self, root: Path, download: bool) -> list[Path]:
        """The files of the first complete layout, in the order of `layouts`; fetched if need be.

        Raises:
            DataError: if they are neither there nor can be fetched.
        """
        found = self._find(root)
        if found is None:
            outcome = self._fetch(root) if download else "Downloading was switched off."
            found = self._find(root)
        if found is None:
            places = "; or ".join(
                f"{' or '.join(str(root / folder) for folder in folders)} with {', '.join(files)}"
                for folders, files in self.layouts
            )
            raise DataError(
                f"{self.name} was not found. Looked for {places} (each file plain or .gz). "
                "Set TIGHTROPE_DATA to the folder that holds one of these, or get the files from "
                f"{self.home}. {outcome}"
            )
        return found

    def _find(self, root: Path) -> list[Path] | None:
        for folders, files in self.layouts:
            for folder in folders:
                plain = [root / folder / file for file in files]
                present = [path if path.is_file() else path.with_name(path.name + ".gz") for path in plain]
                if all(path.is_file() for path in present):
                    return present
        return None

    def _fetch(self, root: Path) -> str:
        """Try to download, and say in a sentence how it went."""
        import pooch  # slow to import, and rarely needed

        for item in self.downloads:
            try:
                pooch.retrieve(
                    item.url,
                    known_hash=f"md5:{item.md5}",
                    fname=item.url.rpartition("/")[2],
                    path=root / item.folder,
                    processor=_unpack if item.url.endswith(".tar.gz") else None,
                    progressbar=sys.stderr.isatty(),
                )
            except (OSError, ValueError) as error:  # network and disk; checksum
                return f"Downloading {item.url} failed: {error}"
        return f"Downloaded from {self.downloads[0].url}, but files are still missing."
