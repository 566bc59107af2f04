"""Files and directories that are there whole or not at all, whatever interrupts their writing."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

INCOMPLETE = "incomplete."  # what is still being written, or was when its writer ended; tfds's name for it


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A name beside `path` for a file or a directory. It becomes `path` at the end of the block, or is gone if that fails.

    A file is on the disk before it has its name: a power cut leaves none that is empty or full of zeros. Of several processes
    that write the same file, the last one's stays. A directory may take the place of an empty one only.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{INCOMPLETE}{uuid.uuid4().hex[:8]}_{path.name}.partial")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
