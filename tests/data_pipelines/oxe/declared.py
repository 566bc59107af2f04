"""Made-up data of the features that an entry of the registry declares."""

import io
from pathlib import Path

import numpy as np
import oxe_schemas
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.oxe.standardise import Transform, Turn, parse

STEPS = 7
SIZE = (24, 32)  # height, width
INSTRUCTION = "do it"


def parts(spec):
    """Of both layouts, without constants."""
    return [part for layout in (spec.proprio, spec.actions) if layout for part in layout.parts if part.references]


def make_columns(spec):
    """float32 columns of the declared shapes: noise, with quaternions and matrices where they are read."""
    rng = np.random.default_rng(0)
    columns = {f"steps/{path}": rng.uniform(-1, 1, (STEPS, int(np.prod(shape)))) for path, shape in spec.features.items()}
    for part in parts(spec):
        path, first, last = parse(part.references[0])
        if isinstance(part, Transform):
            matrix = np.eye(4)
            matrix[:3, 3] = (0.3, -0.2, 0.1)
            columns[path][:, first:last] = matrix.T.ravel()
        if isinstance(part, Turn) and part.encoding.startswith("quat"):
            columns[path][:, first:last] = rng.normal(size=(STEPS, 4))
    return {
        path: values.reshape(STEPS, *spec.features[path.removeprefix("steps/")]).astype(np.float32)
        for path, values in columns.items()
    }


def write_dataset(root: Path, spec, columns, as_bytes: bool = False) -> Path:
    """One episode in the dataset's own schema, by tfds; pixels of step k of every camera are 30 k."""
    image = tfds.features.Image(shape=(*SIZE, 3), dtype=np.uint8, encoding_format="jpeg")
    text = tfds.features.Tensor(shape=(16,), dtype=np.int32) if as_bytes else tfds.features.Text()
    features = {f"observation/{key}": image for key in spec.cameras.values()} | {spec.language: text}
    features |= {path: tfds.features.Tensor(shape=shape, dtype=np.float32) for path, shape in spec.features.items()}
    features = {f"steps/{path}": feature for path, feature in features.items()}
    steps = [{path: _value(path, k, columns, as_bytes) for path in features} for k in range(STEPS)]
    return oxe_schemas.write_episodes(root, spec.name, features, [({}, steps)], "array_record")


def _value(path, k, columns, as_bytes):
    if path in columns:
        return columns[path][k]
    if "instruction" in path:
        return np.array([*map(ord, INSTRUCTION), *[0] * (16 - len(INSTRUCTION))], np.int32) if as_bytes else INSTRUCTION
    file = io.BytesIO()
    Image.fromarray(np.full((*SIZE, 3), 30 * k, np.uint8)).save(file, "JPEG")
    file.seek(0)
    return file
