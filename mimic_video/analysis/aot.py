"""Training steps and policies compiled ahead of time for TPUs, or lowered for GPUs, that need not be there."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from mimic_video.analysis.hlo import Program, Work
from mimic_video.batch import batch_shapes
from mimic_video.config import ExperimentConfig, MeshConfig
from mimic_video.embodiments import Embodiment
from mimic_video.models.attention import REFUSED
from mimic_video.models.devices import BATCH, Capability, assuming
from mimic_video.parallel.chips import Chip
from mimic_video.parallel.sharding import MeshFunction, make_mesh, require_divisible, shardings
from mimic_video.policy.program import PolicyProgram
from mimic_video.stages import split_params
from mimic_video.training.steps import abstract_state, make_train_step
from mimic_video.transforms import compute_statistics
from mimic_video.vam import VideoActionModel


class TopologyError(RuntimeError):
    """A TPU topology that cannot be compiled for."""


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of one or several slices of a TPU topology such as "v5e:16x16", which programs can be compiled for but not run on.

    Raises:
        TopologyError: if the compiler, libtpu, is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError("compiling for TPUs needs libtpu, which is not installed: launch/setup.sh compile")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked what machine this is; what is not used, but complained about
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so others may compile, too
    }
    from jax.experimental import topologies  # it loads libtpu, which reads the environment

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # by default hosts have four
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(
            f"topology '{name}' is not one that libtpu knows: {error}; expected one like v5e:16x16 or v5p:4x4x8"
        ) from error


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's memory.

    Attributes:
        limit: what programs can use.
        arguments: state, frozen parameters and batch.
        outputs: of which `aliased` stand where arguments stood.
        temporaries: at their peak.
        code: the program's.
        unread: frozen parameters that are there though the program does not read them.
        peak: all of them together.
    """

    limit: float
    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    code: float
    unread: float
    peak: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def free(self) -> float:
        """The share of the limit that is left."""
        return 1 - self.peak / self.limit


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as compiled for one kind of chip."""

    memory: Memory
    work: Work
    seconds: float


class OutOfMemoryError(RuntimeError):
    """The compiler found no way to run the program in a chip's memory; `required` bytes against `limit`."""

    def __init__(self, message: str, required: float, limit: float):
        super().__init__(message)
        self.required, self.limit = required, limit


def step_program(config: ExperimentConfig, devices: Sequence[jax.Device]) -> tuple[MeshFunction, tuple[Any, ...]]:
    """The training step of `config.stage` for all of the devices, and shapes of its arguments, spread over them.

    Raises:
        ConfigError: if the mesh or the batch cannot be laid out on the devices.
    """
    vam, mesh = VideoActionModel(config), make_mesh(config.mesh, list(devices))
    require_divisible(config.train.batch_size, mesh)
    state = abstract_state(vam, mesh)
    frozen = jax.eval_shape(lambda params: split_params(params, config)[1], vam.shapes)
    frozen = {
        name: jax.tree.map(
            lambda leaf, where, name=name: jax.ShapeDtypeStruct(leaf.shape, vam.dtype(name), sharding=where),
            part,
            shardings({name: part}, mesh)[name],
        )
        for name, part in frozen.items()
    }
    batch = _spread(batch_shapes(config, config.train.batch_size), jax.sharding.NamedSharding(mesh, BATCH))
    return make_train_step(vam, mesh, state), (state, frozen, batch)


def policy_program(
    config: ExperimentConfig,
    device: jax.Device,
    batch: int,
    samples: int | None = None,
    continuing: bool = False,
    robot: Embodiment | None = None,
) -> tuple[MeshFunction, tuple[Any, ...]]:
    """The policy's program for `batch` robots on one device, and shapes of its arguments.

    Args:
        samples: of chunks that share all but their noise; None for one chunk.
        continuing: whether chunks have to continue what a robot is executing.
        robot: by default as wide as the decoder, with all cameras.
    """
    program = PolicyProgram(config, robot or widest_robot(config))
    params = jax.eval_shape(program.parameters, program.vam.shapes)
    arguments = [params, *program.input_shapes(batch).values()]
    if continuing:
        arguments.append(program.prefix_shapes(batch))
    mesh = make_mesh(MeshConfig(), [device])
    function = MeshFunction(jax.jit(functools.partial(program, samples=samples)), mesh)
    return function, tuple(_spread(arguments, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())))


def widest_robot(config: ExperimentConfig) -> Embodiment:
    """One that has all that the model has; its actions and proprioception are normalised by statistics of nothing."""
    random, decoder = np.random.default_rng(0), config.decoder
    shapes = {"action": (config.data.action_horizon, decoder.action_dim), "proprio": (1, decoder.proprio_dim)}
    statistics = {name: compute_statistics(random.normal(size=(100, *shape))) for name, shape in shapes.items()}
    return Embodiment("widest", 0, statistics, {"action": (), "proprio": ()}, config.data.cameras)


def _spread(shapes: Any, where: jax.sharding.NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)


def compile_program(function: MeshFunction, arguments: tuple[Any, ...], chip: Chip) -> Compiled:
    """Compiles a program for the devices of its mesh; arrays are never made.

    Raises:
        OutOfMemoryError: if the compiler refuses the program for the chip's memory.
    """
    start = time.perf_counter()
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        raise out_of_memory(str(error)) or error from error
    seconds = time.perf_counter() - start
    slices = len({getattr(device, "slice_index", 0) for device in function.mesh.devices.flat})
    work = Program(compiled.as_text()).work(slices)
    return Compiled(memory_of(compiled.memory_analysis(), chip.hbm, bytes_per_chip(arguments)), work, seconds)


def bytes_per_chip(tree: Any) -> int:
    """Bytes that arrays, or shapes with their shardings, take on one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def as_on_gpu(capability: Capability | None) -> Iterator[None]:
    """Within it, programs are traced and lowered as where there are GPUs of that compute capability, which need not be here.

    The rules of cuDNN's attention on shapes, batching and gradients apply. JAX looks for the library and for the chip on this
    machine and has no public way to be told of others, so its two questions are answered here.
    """
    from jax._src.cudnn import fused_attention_stablehlo  # not public: what needs no GPU does not depend on it

    def reaches(least: str) -> bool:
        return capability is not None and capability >= tuple(map(int, least.split(".")))

    answers: dict[str, Any] = {"check_cudnn_version": lambda: 91_100, "check_compute_capability": reaches}
    with assuming("gpu", capability), unittest.mock.patch.multiple(fused_attention_stablehlo, **answers):
        yield


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What is known of a program for GPUs without compiling it, which takes one.

    Attributes:
        arguments: bytes on one device.
        largest: (bytes, shape and dtype, the operation it comes from) of the largest arrays, the largest first: whole, but inside
            of attention on several devices one device's part. XLA need not make all of them.
        flash: number of calls of cuDNN's attention in the program's text, in which loops stand once.
        refused: what cuDNN's attention does not take, and XLA attends to.
    """

    arguments: int
    largest: tuple[tuple[int, str, str], ...]
    flash: dict[str, int]
    refused: tuple[str, ...]


def lower_for_gpu(function: MeshFunction, arguments: tuple[Any, ...], capability: Capability) -> Lowered:
    """Traces and lowers a program, which must not have been traced before, for GPUs."""
    REFUSED.clear()
    with as_on_gpu(capability):
        traced = function.trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"@__cudnn\$fmha\w*?(Backward)?\(", text)
    flash = {"forward": kernels.count(""), "backward": kernels.count("Backward")}
    return Lowered(bytes_per_chip(arguments), tuple(largest_arrays(traced.jaxpr.jaxpr)), flash, tuple(REFUSED))


def largest_arrays(jaxpr: Any, number: int = 5) -> list[tuple[int, str, str]]:
    """As of `Lowered`, those of a program as it was traced."""
    found: dict[str, tuple[int, str, str]] = {}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                shape = variable.aval.str_short()
                if hasattr(variable.aval, "dtype"):
                    size = math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
                    found.setdefault(shape, (size, shape, equation.primitive.name))
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jaxpr)
    return sorted(found.values(), reverse=True)[:number]


def memory_of(analysis: Any, limit: float, resident: float) -> Memory:
    """From a compiled program's `memory_analysis()`, and what the caller's arrays take on a chip, read or not."""
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    arguments, outputs, aliased, temporaries, code = (getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds)
    unread = max(0.0, resident - arguments)
    peak = arguments + outputs - aliased + temporaries + code + unread
    return Memory(limit, arguments, outputs, aliased, temporaries, code, unread, peak)


def out_of_memory(message: str) -> OutOfMemoryError | None:
    """The error behind a compiler's message, if that says that the program does not fit the chip's main memory."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message
    )
    if not found:
        return None
    unit = dict(zip(("", *"KMGT"), (1024.0**power for power in range(5)), strict=True))
    required, limit = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
    return OutOfMemoryError(message.splitlines()[0], required, limit)


DCN_RATE = 12.5e9 / 4  # bytes per second and chip: hosts of four chips with one 100 Gbit/s interface


@dataclasses.dataclass(frozen=True)
class StepBound:
    """Seconds that a step takes at least for each of what it needs, if everything else cost nothing; and which takes longest."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def binding(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def step_bound(work: Work, chip: Chip) -> StepBound:
    """At the chip's peak rates, all links in use at once."""
    sent = {network: sum(each.bytes for each in work.collectives if each.network == network) for network in ("ici", "dcn")}
    return StepBound(
        compute=work.flops / chip.flops,
        hbm=work.hbm_bytes / chip.hbm_rate,
        ici=sent["ici"] / chip.link_rate,
        dcn=sent["dcn"] / DCN_RATE,
    )
