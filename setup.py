"""The package and the one place of its dependencies; tool settings are in pyproject.toml."""

import runpy

from setuptools import find_packages, setup

EXTRAS = {
    # Reading and writing RLDS. Grain makes batches in worker processes and resumes; tfds reads ArrayRecord without TensorFlow;
    # simplejpeg decodes faster than Pillow and without the interpreter lock; google-crc32c verifies TFRecord; fsspec opens
    # datasets in buckets. LeRobot's folders are read as they are by pyarrow, which tfds needs as well, and PyAV.
    "data": [
        "array_record",
        "av",
        "fsspec",
        "google-crc32c",
        "grain>=0.2.16",
        "importlib_resources",
        "pyarrow",
        "simplejpeg",
        "tensorflow-datasets>=4.9.9",
    ],
    # Other people's recordings: LIBERO's HDF5.
    "formats": ["h5py"],
    # Meta-World pins the MuJoCo that works with it, but forgets packaging.
    "sim": ["metaworld==3.1.1", "packaging"],
    "report": ["matplotlib"],
    # Published weights: .pt files, and repositories. Safetensors files need neither.
    "convert": ["torch", "huggingface-hub"],
    "hub": ["huggingface-hub>=1"],  # policies on the Hugging Face Hub, read and written; datasets that new_robot downloads
    # T5 features of instructions; sentencepiece and protobuf for models that come without a tokenizer.json.
    "text": ["torch", "transformers>=5", "sentencepiece", "protobuf"],
    "video": ["av"],  # MP4
    "serve": ["msgpack>=1.0.5", "prometheus-client", "websockets>=16"],  # the policy server, and mimic_video_client
    # Recordings of what policies see and do. Large: it brings a viewer. The first with `set_time` is 0.23.
    "rerun": ["rerun-sdk>=0.23"],
    "stablehlo": ["flatbuffers"],  # JAX reads and writes programs of policies with it
    "gcs": ["gcsfs"],  # run directories in Google Cloud Storage
    "wandb": ["wandb"],  # metrics there, too
    "notebook": ["ipykernel", "nbclient", "nbformat"],  # runs launch/colab without a browser, as the tests do
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda13]>=0.10"],
}
EXTRAS["compile"] = EXTRAS["tpu"]  # the compiler, libtpu, in the version that JAX wants; no TPU is needed
EXTRAS["quickstart"] = EXTRAS["data"] + EXTRAS["sim"] + EXTRAS["report"]
# What most tests need, and nothing large; `test-all` is for the stages that the markers in pyproject.toml name.
EXTRAS["test"] = [
    *(package for extra in ("data", "formats", "report", "video", "serve", "gcs") for package in EXTRAS[extra]),
    "beartype",  # what jaxtyping checks shapes with
    "gcp-storage-emulator",  # a bucket on this machine
    "mypy",
    "pytest",
    "pytest-xdist",  # most tests compile, on one core
    "ruff",
]
# The pages of docs/ as a web site. MyST reads Markdown and, with myst-nb, notebooks; furo is a theme that needs no network, and
# sphinx-copybutton copies commands of several lines. autodoc imports what it describes: the data pipeline and the client.
EXTRAS["docs"] = [*EXTRAS["data"], *EXTRAS["serve"], "furo", "myst-nb>=1.3", "sphinx>=8", "sphinx-copybutton"]
EXTRAS["test-all"] = [
    *(
        package
        for extra in ("test", "sim", "convert", "hub", "text", "wandb", "notebook", "compile", "stablehlo", "rerun")
        for package in EXTRAS[extra]
    ),
    "diffusers",  # an independent implementation of both video networks, to compare ours with
    "opencv-python-headless",  # what the loader is measured beside
    "peft",
    "rlds",  # it says whether what we write is RLDS
    "torch==2.13.0",  # what the networks were compared with
    "tensorflow-cpu>=2.21",  # only to check that what we write is what plain tfds reads
]

setup(
    name="mimic-video-jax",  # the import is mimic_video; that name is taken on PyPI
    version=runpy.run_path("mimic_video/__init__.py")["__version__"],
    description="mimic-video (Video-Action Models) in JAX: train, evaluate and serve",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mimic_video*", "data_pipelines*"]),  # configs and launch run from the clone
    package_data={"": ["py.typed"]},
    install_requires=[
        "absl-py",  # flags of the launch scripts, logging
        "chex",  # shapes, dtypes and trees that a model or a test expects
        "etils[epath]",  # paths that may be in a bucket; orbax has them, too
        "flax>=0.12",  # the networks, as NNX modules
        "jax>=0.10",
        "jaxtyping",  # shapes in signatures; the tests check them at run time
        "ml-collections>=1.1",  # experiment files and --config.FIELD=VALUE
        "numpy>=2",
        "optax>=0.2.6",  # optimizers and schedules
        "orbax-checkpoint>=0.11.30",  # checkpoints of sharded arrays, by many hosts
        "pillow",  # JPEG frames, resizing, GIFs
        "pyyaml",  # jobs of SkyPilot; flax has it, too
        "rich",  # the table of a sweep in the terminal; flax has it, too
        "safetensors>=0.8",  # weights; the first with bfloat16 in NumPy that this was tried with
        "scipy",  # rotations, intervals of means
        "tensorboardX",  # TensorBoard files without TensorFlow
        "tqdm",
    ],
    extras_require=EXTRAS,
)
