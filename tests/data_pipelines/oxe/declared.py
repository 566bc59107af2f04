"""Made-up data of the features that an entry of the registry declares."""

import io
from pathlib import Path

import numpy as np
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
    return {path: values.reshape(STEPS, *spec.features[path.removeprefix("steps/")]).astype(np.float32)
            for path, values in columns.items()}  # fmt: skip


def write_dataset(root: Path, spec, columns, as_bytes: bool = False) -> Path:
    """One episode in the dataset's own schema, by tfds; pixels of step k of every camera are 30 k."""
    directory = root / spec.name / "1.0.0"
    directory.mkdir(parents=True)
    image = tfds.features.Image(shape=(*SIZE, 3), dtype=np.uint8, encoding_format="jpeg")
    text = tfds.features.Tensor(shape=(16,), dtype=np.int32) if as_bytes else tfds.features.Text()
    flat = {f"observation/{key}": image for key in spec.cameras.values()} | {spec.language: text}
    flat |= {path: tfds.features.Tensor(shape=shape, dtype=np.float32) for path, shape in spec.features.items()}
    steps = [_nest({path: _value(path, k, columns, as_bytes) for path in flat}) for k in range(STEPS)]

    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(_nest(flat))})
    identity = tfds.core.DatasetIdentity(spec.name, tfds.core.Version("1.0.0"), data_dir=str(directory), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"steps": steps}]})
    writer.close_all()
    return directory


def _value(path, k, columns, as_bytes):
    if f"steps/{path}" in columns:
        return columns[f"steps/{path}"][k]
    if "instruction" in path:
        return np.array([*map(ord, INSTRUCTION), *[0] * (16 - len(INSTRUCTION))], np.int32) if as_bytes else INSTRUCTION
    file = io.BytesIO()
    Image.fromarray(np.full((*SIZE, 3), 30 * k, np.uint8)).save(file, "JPEG")
    file.seek(0)
    return file


def _nest(flat):
    """Groups are one level deep; a key of Kuka or BC-Z has a slash of its own."""
    nested = {}
    for path, value in flat.items():
        group, slash, key = path.partition("/")
        if slash:
            nested.setdefault(group, {})[key] = value
        else:
            nested[path] = value
    return nested
