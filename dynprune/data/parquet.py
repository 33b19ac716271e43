"""Parquet files that say what their rows are about, and that name themselves when they cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_VERSION_KEY, _LAYERS_KEY, _SCORE_KEY = b"dynprune.schema_version", b"dynprune.num_layers", b"dynprune.score"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Header:
    """What all rows of a file are about.

    Attributes:
        num_layers: L, the SLM's decoder layers.
        score: Name of the score.
    """

    num_layers: int
    score: str


def with_header(schema: pa.Schema, header: Header) -> pa.Schema:
    """Put a header into a schema's metadata.

    Args:
        schema: The columns.
        header: The header.
    """
    return schema.with_metadata(
        {
            _VERSION_KEY: str(SCHEMA_VERSION),
            _LAYERS_KEY: str(header.num_layers),
            _SCORE_KEY: header.score,
        }
    )


def header_of(file: pq.ParquetFile) -> Header:
    """Read the header of a file that `open_parquet` opened."""
    metadata = file.schema_arrow.metadata
    return Header(num_layers=int(metadata[_LAYERS_KEY]), score=metadata[_SCORE_KEY].decode())


@contextmanager
def open_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    """Open a file of known columns; pages whose checksum is wrong are refused, while the block reads as well.

    Args:
        path: The file.
        schema: Its columns.

    Yields:
        The open file.

    Raises:
        ValueError: The file is missing, broken, of another version or of other columns.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check(path, file.schema_arrow, schema)
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run the stage that makes it") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it where its folder ends in .partial, else the whole "
            f"folder {path.parent}, and run the same command again"
        ) from error


def _check(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    metadata = found.metadata or {}
    if not {_VERSION_KEY, _LAYERS_KEY, _SCORE_KEY} <= metadata.keys():
        raise ValueError(f"{path} was not written by dynprune: its metadata names no score and no layers")
    version = metadata[_VERSION_KEY].decode()
    if version != str(SCHEMA_VERSION):
        raise ValueError(f"{path} has schema version {version}, this dynprune reads {SCHEMA_VERSION}; make the file anew")
    if not found.equals(expected):
        raise ValueError(f"{path} has the columns {found.names}; expected {expected.names}")
