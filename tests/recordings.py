"""Recordings of Rerun, read with the library's own reader."""

import collections
import io

import numpy as np
from PIL import Image


def read(path):
    """{entity: [(seconds or None, {component: values}), ...] in order of time}, of all that was logged to a file.

    Components go by their last name, such as `scalars`; what has no time is first. Images are decoded.
    """
    from rerun.chunk import RrdReader

    entities = collections.defaultdict(list)
    for chunk in RrdReader(path).stream():
        batch = chunk.to_record_batch()
        names = [name for name in batch.schema.names if ":" in name]
        times = batch.column("time").cast("int64").to_pylist() if "time" in batch.schema.names else [None] * batch.num_rows
        columns = {name.partition(":")[2]: batch.column(name).to_pylist() for name in names}
        for row, time in enumerate(times):
            values = {name: column[row] for name, column in columns.items() if column[row] is not None}
            if "blob" in values:
                values["image"] = np.asarray(Image.open(io.BytesIO(bytes(values.pop("blob")[0]))))
            entities[chunk.entity_path.lstrip("/")].append((None if time is None else time / 1e9, values))
    return {
        name: sorted(rows, key=lambda row: -1.0 if row[0] is None else row[0])
        for name, rows in entities.items()
        if not name.startswith("__")
    }


def series(rows):
    """(times, values (n, d)) of an entity with numbers."""
    found = [(time, values["scalars"]) for time, values in rows if "scalars" in values]
    times, values = zip(*found, strict=True)
    return np.array(times), np.array(values)
