"""The part of the benchmark that needs TensorFlow: windows of frames by plain tfds and tf.data.

    python -m data_pipelines.benchmark_tfdata DIRECTORY FRAMES HEIGHT WIDTH BATCH THREADS

For every number of windows read from stdin, that many are made and their frames per second printed.
"""

import itertools
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
import tensorflow_datasets as tfds


def batches(directory: str, frames: int, size: tuple[int, int], batch: int, threads: int) -> tf.data.Dataset:
    """Endless batches uint8 (batch, frames, *size, 3): a random window of every episode, again and again."""

    def decode(file: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(file, channels=3)
        if tuple(image_size) == size:
            return image
        return tf.cast(tf.round(tf.image.resize(image, size, "bilinear", antialias=True)), tf.uint8)

    def window(episode: dict) -> tf.Tensor:
        files = episode["steps"]["observation"]["image_primary"]
        start = tf.random.uniform((), maxval=tf.shape(files)[0] - frames + 1, dtype=tf.int32)
        return tf.map_fn(decode, files[start : start + frames], fn_output_signature=tf.TensorSpec((*size, 3), tf.uint8))

    builder = tfds.builder_from_directory(directory)
    image_size = builder.info.features["steps"]["observation"]["image_primary"].shape[:2]
    episodes = builder.as_dataset(split="train", decoders={"steps": tfds.decode.SkipDecoding()}, shuffle_files=False)
    return episodes.repeat().map(window, num_parallel_calls=threads).batch(batch).prefetch(2)


def main(directory: str, *numbers: str) -> None:
    frames, height, width, batch, threads = map(int, numbers)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    stream = iter(batches(directory, frames, (height, width), batch, threads).as_numpy_iterator())
    for line in sys.stdin:
        for _ in range(4):  # made ahead
            next(stream)
        count = int(line) // batch
        start = time.perf_counter()
        for _ in itertools.islice(stream, count):
            pass
        print(count * batch * frames / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
