"""Reader of IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from normkit.errors import DataError

UNSIGNED_BYTE = 8  # the type code of the third byte


def read_idx(path: Path) -> UInt8[Tensor, "..."]:
    """Read a gzipped IDX file of bytes.

    Args:
        path: File whose header is two zeros, the type code 8, the number of axes and their
            lengths as big-endian 32-bit integers.

    Raises:
        DataError: If the file is missing, not gzipped, or not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy the file again") from error
    return _decoded(path, content)


def _decoded(path: Path, content: bytes) -> UInt8[Tensor, "..."]:
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise DataError(
            f"{path} begins with {content[:4].hex(' ')}, but an IDX file of bytes begins with "
            f"00 00 08; copy the file again"
        )
    num_axes = content[3]
    offset = 4 + 4 * num_axes
    if len(content) < offset:
        raise DataError(f"{path} ends in the middle of its header; copy the file again")
    shape = struct.unpack(f">{num_axes}I", content[4:offset])
    if len(content) - offset != math.prod(shape):
        raise DataError(
            f"{path} holds {len(content) - offset} values, but its header says {shape}; "
            f"copy the file again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=offset).copy()).view(shape)
