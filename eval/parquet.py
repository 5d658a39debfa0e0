"""Features as one Parquet file, for data frames and databases: a row a photo, a column for each array.

pyarrow is not among this project's packages. Points are not in the file: they have rows of their own (points.npy and
points.csv).
"""

import importlib.util
from pathlib import Path

from eval.feature_folder import FeatureFolder
from runtime.errors import UserError
from runtime.files import atomic_path

FILE = "features.parquet"
BYTES_AT_A_TIME = 1 << 26  # of features in memory


def require_pyarrow() -> None:
    """Raises UserError with the command that installs it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("--parquet needs the package pyarrow: `.venv/bin/python -m pip install pyarrow`")


def write_parquet(folder: FeatureFolder, names: list[str]) -> Path:
    """Write the file from the finished arrays. `patches` are flat; their grid is in the column's metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {name: array for name, array in folder.arrays.items() if name != "points"}
    fields = [pa.field("photo", pa.string())]
    for name, array in arrays.items():
        kind = pa.list_(pa.from_numpy_dtype(array.dtype), int(array[0].size))
        fields.append(pa.field(name, kind, metadata={"shape": str(list(array.shape[1:]))}))
    schema, path = pa.schema(fields), folder.folder / FILE
    step = max(1, BYTES_AT_A_TIME // sum(array[0].nbytes for array in arrays.values()))
    with atomic_path(path) as draft, parquet.ParquetWriter(draft, schema) as writer:
        for first in range(0, len(names), step):
            rows = slice(first, first + step)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(array[rows].reshape(-1)), int(array[0].size))
                for array in arrays.values()
            ]
            writer.write_table(pa.Table.from_arrays([pa.array(names[rows]), *columns], schema=schema))
    return path
