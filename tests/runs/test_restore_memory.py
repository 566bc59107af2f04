"""How much memory of the host it takes to read a checkpoint: what is read, and not another copy of it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

# Saves 256 MB of float32 in 16 arrays split over eight devices; or restores them on another mesh, and says how the peak of the
# process's memory rose. A simulated device's memory is the host's, so what was read counts once.
CHILD = """
import json, pathlib, resource, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from mimic_video.config import MeshConfig
from mimic_video.parallel.sharding import make_mesh
from mimic_video.runs import arrays
from mimic_video.runs.arrays import load_tree, tree_args, tree_handler
import orbax.checkpoint as ocp

path, what = pathlib.Path(sys.argv[1]), sys.argv[2]
mesh = make_mesh(MeshConfig(data=1, fsdp=8) if what == "save" else MeshConfig(data=2, fsdp=4))
where = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if what == "save":
    make = jax.jit(lambda key: jax.random.normal(key, (2000, 2000)), out_shardings=where)
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        checkpointer.save(path, args=tree_args({str(i): make(jax.random.key(i)) for i in range(16)}))
else:
    dtype = jnp.dtype(what)
    arrays._GROUP_BYTES = 2**26  # in the proportion of a gibibyte to the gigabytes of a large model
    target = {str(i): jax.ShapeDtypeStruct((2000, 2000), dtype, sharding=where) for i in range(16)}
    load_tree(path, {"0": target["0"]})  # compiles, and starts threads
    before = peak()
    tree = load_tree(path, target)
    size = sum(leaf.nbytes for leaf in tree.values()) * mesh.shape["data"]
    print(json.dumps({"before": before, "size": size, "rise": peak() - before}))
"""


@pytest.mark.processes
def test_restoring_takes_the_memory_of_what_is_restored_and_little_more(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}

    def child(what):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "tree"), what]
        return subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True, text=True).stdout

    child("save")
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        found = json.loads(child(dtype))
        print(
            f"restored {found['size'] / 1e6:.0f} MB of {dtype} on eight devices; the peak of the process's memory rose by "
            f"{found['rise'] / 1e6:.0f} MB"
        )
        assert found["size"] == 2 * 16 * 2000 * 2000 * itemsize
        assert found["rise"] < 1.6 * found["size"]
