r"""Writing features to a file batch by batch, without knowing how many rows will come.

Rows and names are spooled, raw, to hidden files beside the output, which `close` assembles and moves into place in one
step: memory stays that of one batch, and a run that fails leaves no half-written output. The disk holds the features
twice for a moment. Every format reads back without this package:

    npz           np.load(f)["features"], np.load(f)["names"], json.loads(str(np.load(f)["metadata"]))
    safetensors   with safetensors.safe_open(f, "numpy") as file:
                      file.get_tensor("features")
                      file.get_tensor("names").tobytes().decode().split("\0")
                      file.metadata()
    parquet       pyarrow.parquet.read_table(f), columns "name" and "features" (a fixed-size list of float32: features
                  of more than one dimension are flattened, their shape is the JSON in the schema's metadata under
                  "shape")
"""

import importlib.util
import json
import os
import re
import shutil
import struct
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from perceptual_mae_models.version import __version__

if TYPE_CHECKING:
    from torch import Tensor  # not at run time: problems with the output are told before torch is imported

SUFFIXES = (".npz", ".safetensors", ".parquet")

# A row group or chunk on its way from the spool into the output.
CHUNK_BYTES = 16 * 2**20


class OutputError(OSError):
    """A file that cannot be written; nearly always told before anything is computed."""


_LONE = re.compile("[\ud800-\udfff]")
"""What stands for bytes of file names that are not UTF-8, and for halves of Windows' pairs."""


class FeatureWriter:
    """Writes names and features, in order, to `.npz`, `.safetensors` or `.parquet`; a context manager.

        with FeatureWriter("features.npz", extractor.metadata) as writer:
            for batch in extractor.stream(files):
                writer.write(batch.names, batch.features)

    The file appears when the context ends without an exception, replacing an older one.

    Attributes:
        rows: Rows written so far.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Prepares the output.

        Args:
            path: Where to write; the suffix decides the format.
            metadata: Facts to keep with the features.

        Raises:
            OutputError: See `check_output`.
        """
        self.path = Path(path)
        check_output(self.path)
        self.metadata = {"perceptual_mae_models": __version__, **(metadata or {})}
        self.rows = 0
        self._shape: tuple[int, ...] | None = None
        self._longest_name = 0
        base = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}"
        self._spool_paths = (base.with_name(f"{base.name}.rows"), base.with_name(f"{base.name}.names"))
        self._unfinished = base.with_name(f"{base.name}.tmp")
        # Not tempfile: its files are readable by their owner only, and the output would inherit that.
        self._row_spool = self._spool_paths[0].open("xb")
        self._name_spool = self._spool_paths[1].open("xb")

    def write(self, names: Sequence[str], features: "Tensor") -> None:
        """Appends rows.

        Args:
            names: One a row. Bytes of file names that are not UTF-8 become U+FFFD.
            features: (len(names), ...), of the same shape from call to call; written as float32.

        Raises:
            ValueError: Rows and names differ in number, the shape is not that of earlier rows, or a name holds NUL.
        """
        if len(names) != len(features):
            raise ValueError(f"{len(names)} names for {len(features)} rows")
        if len(names) == 0:
            return
        shape = tuple(features.shape[1:])
        if self._shape not in (None, shape):
            raise ValueError(f"rows of shape {shape} after rows of shape {self._shape}")
        self._shape = shape
        for name in names:
            if "\0" in name:
                raise ValueError(f"a name holds NUL, which separates names: {name!r}")
            clean = _LONE.sub("\ufffd", name)
            self._longest_name = max(self._longest_name, len(clean))
            self._name_spool.write((b"\0" if self.rows else b"") + clean.encode())
            self.rows += 1
        self._row_spool.write(np.ascontiguousarray(features.detach().float().cpu().numpy(), "<f4").data)

    def close(self) -> None:
        """Assembles the output and puts it in place.

        Raises:
            ValueError: Nothing was written; no file appears then.
            OutputError: The disk is full, for example. What was computed is kept, and the message says where.
        """
        try:
            self._row_spool.close()
            self._name_spool.close()
            if self._shape is None:
                raise ValueError(f"no features to write to {self.path}")
            assemble = {".npz": self._npz, ".safetensors": self._safetensors, ".parquet": self._parquet}
            assemble[self.path.suffix](self._shape)
            self._unfinished.replace(self.path)
        except OSError as error:
            self._unfinished.unlink(missing_ok=True)
            rows, names = self._spool_paths
            shape = " x ".join(map(str, (self.rows, *(self._shape or ()))))
            raise OutputError(
                f"cannot write {self.path} ({error.strerror or error}), which needs its size on the disk twice; the"
                f" features are kept in {rows} ({shape} little-endian float32) and {names} (separated by NUL)"
            ) from error
        except BaseException:
            self.discard()
            raise
        self.discard()

    def discard(self) -> None:
        """Gives up: removes everything but a finished output."""
        self._row_spool.close()
        self._name_spool.close()
        for path in (*self._spool_paths, self._unfinished):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _npz(self, shape: tuple[int, ...]) -> None:
        # Stored, not deflated: float features do not compress, and np.load reads stored members much faster.
        with zipfile.ZipFile(self._unfinished, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                _write_npy_header(member, (self.rows, *shape), np.dtype("<f4"))
                with self._spool_paths[0].open("rb") as rows:
                    shutil.copyfileobj(rows, member, CHUNK_BYTES)
            # Fixed width, because np.load reads other strings only through pickle.
            text = np.dtype(f"<U{max(self._longest_name, 1)}")
            with archive.open("names.npy", "w", force_zip64=True) as member:
                _write_npy_header(member, (self.rows,), text)
                for names in self._names(max(CHUNK_BYTES // text.itemsize, 1)):
                    member.write(np.array(names, text).tobytes())
            with archive.open("metadata.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(self.metadata)), allow_pickle=False)

    def _safetensors(self, shape: tuple[int, ...]) -> None:
        # Written by hand, since the library's writers need every tensor in memory. Rows come first: floats must stay
        # aligned, which bytes after them cannot disturb.
        row_bytes, name_bytes = (path.stat().st_size for path in self._spool_paths)
        header = json.dumps(
            {
                "__metadata__": {**self.metadata, "names_encoding": "UTF-8, separated by NUL"},
                "features": {"dtype": "F32", "shape": [self.rows, *shape], "data_offsets": [0, row_bytes]},
                "names": {"dtype": "U8", "shape": [name_bytes], "data_offsets": [row_bytes, row_bytes + name_bytes]},
            }
        ).encode()
        header += b" " * (-len(header) % 8)
        with self._unfinished.open("xb") as output:
            output.write(struct.pack("<Q", len(header)) + header)
            for path in self._spool_paths:
                with path.open("rb") as spool:
                    shutil.copyfileobj(spool, output, CHUNK_BYTES)

    def _parquet(self, shape: tuple[int, ...]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        width = int(np.prod(shape))
        schema = pa.schema(
            [pa.field("name", pa.string()), pa.field("features", pa.list_(pa.float32(), width))],
            metadata={**self.metadata, "shape": json.dumps(shape)},
        )
        rows_a_group = max(CHUNK_BYTES // (4 * width), 1)
        with (
            self._spool_paths[0].open("rb") as rows,
            pq.ParquetWriter(self._unfinished, schema, use_dictionary=False, compression="none") as output,
        ):
            for names in self._names(rows_a_group):
                values = pa.array(np.fromfile(rows, "<f4", len(names) * width))
                columns = [pa.array(names, pa.string()), pa.FixedSizeListArray.from_arrays(values, width)]
                output.write_table(pa.table(columns, schema=schema))

    def _names(self, count: int) -> Iterator[list[str]]:
        """Reads the names back, `count` at a time."""
        with self._spool_paths[1].open("rb") as spool:
            names = _split(spool)
            while chunk := list(islice(names, count)):
                yield chunk


def check_output(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Finds what would keep a file from being written, before the work is done.

    Args:
        path: The output file.
        suffixes: The formats to choose from.

    Raises:
        OutputError: The suffix is not one of these, the folder is missing or not writable, the path is a folder, or the
            format needs a library that is not installed.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise OutputError(f"cannot write {path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: the folder {path.parent} is not writable")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise OutputError(f"cannot write {path}: Parquet needs pyarrow (pip install pyarrow)")


def _write_npy_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def _split(spool: IO[bytes]) -> Iterator[str]:
    rest = b""
    while block := spool.read(2**16):
        *complete, rest = (rest + block).split(b"\0")
        yield from (name.decode() for name in complete)
    yield rest.decode()
