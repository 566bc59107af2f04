"""Which hosts a TPU slice has, beside this one, where JAX does not know it by itself.

What a host is told of its peers:

  * on GKE: TPU_PROCESS_ADDRESSES_PATH, a file of addresses, TPU_PROCESS_ADDRESSES or TPU_WORKER_HOSTNAMES, in this order, and its
    own number, TPU_WORKER_ID;
  * on machines of the Cloud TPU API: the metadata `agent-worker-number` and `worker-network-endpoints`, which JAX reads;
  * on machines of managed instance groups: the metadata `worker-id` and the table `tpu-env`.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax._src import hardware_utils

from mimic_video.config import ConfigError
from mimic_video.parallel.metadata import open_metadata

PORT = 8482  # of process 0, as JAX has it on TPUs
_ADDRESSES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_IN_TABLE = (*_ADDRESSES, "WORKER_NETWORK_ENDPOINTS")  # of tpu-env
_PART_OF_A_HOST = ("TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")  # with which one uses fewer chips on purpose
# Types that count cores, two of a chip; all others count chips.
_OF_CORES = re.compile(r"(v2|v3|v4|v5p|v7x|tpu7x)-\d+")


class Peers(NamedTuple):
    """Address of process 0, how many there are, and the number of this one."""

    coordinator: str
    processes: int
    own: int


def told_addresses(environment: Mapping[str, str]) -> list[str]:
    """Addresses of all hosts of this one's slice that the environment tells; none if it does not.

    Raises:
        ConfigError: naming the file of TPU_PROCESS_ADDRESSES_PATH, if it cannot be read or is empty.
    """
    if path := environment.get("TPU_PROCESS_ADDRESSES_PATH"):
        try:
            text = pathlib.Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"environment variable TPU_PROCESS_ADDRESSES_PATH is {path!r}, which cannot be read: {error}"
            ) from error
        if not text:
            raise ConfigError(f"environment variable TPU_PROCESS_ADDRESSES_PATH is {path!r}, an empty file; expected host:port,…")
    else:
        text = next((environment[name] for name in _ADDRESSES if environment.get(name)), "")
    return [address.strip() for address in text.split(",") if address.strip()]


def instance_group_peers() -> Peers | None:
    """The hosts of a slice of one managed instance group; None if the metadata do not say so."""
    table, index = tpu_table(), metadata("worker-id")
    text = next((table[name] for name in _IN_TABLE if table.get(name)), "") or metadata("worker-network-endpoints")
    hosts = [_host(address) for address in text.split(",")]
    if len(hosts) == 1 or not index.isdecimal() or int(index) >= len(hosts) or table.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return None
    return Peers(f"{hosts[0]}:{PORT}", len(hosts), int(index))


def _host(address: str) -> str:
    """Of "host", "host:port" or "name:number:host"."""
    parts = address.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def require_alone(environment: Mapping[str, str]) -> None:
    """Raises ConfigError if the slice of this host has more chips than are here: it is not to be trained on alone."""
    here = hardware_utils.num_available_tpu_chips_and_device_id()[0]
    if not here or any(environment.get(name) for name in _PART_OF_A_HOST):
        return
    variables = "environment variable {} is"
    said = [
        (variables, "TPU_TOPOLOGY", environment.get("TPU_TOPOLOGY", ""), _topology_chips),
        (variables, "TPU_ACCELERATOR_TYPE", environment.get("TPU_ACCELERATOR_TYPE", ""), _type_chips),
    ]
    looked = f"looked for TPU_PROCESS_ADDRESSES_PATH, {', '.join(_ADDRESSES)}"
    if "TPU_SKIP_MDS_QUERY" in environment:
        looked += ", and asked no metadata, as TPU_SKIP_MDS_QUERY is set"
    else:
        table = tpu_table()
        said += [
            ("{} of the metadata tpu-env is", "TOPOLOGY", table.get("TOPOLOGY", ""), _topology_chips),
            ("{} of the metadata tpu-env is", "ACCELERATOR_TYPE", table.get("ACCELERATOR_TYPE", ""), _type_chips),
            ("the metadata {} is", "accelerator-type", metadata("accelerator-type"), _type_chips),
        ]
        looked += ", and in the metadata for agent-worker-number, worker-id, worker-network-endpoints and tpu-env"
        looked += f" (which has {', '.join(table) or 'nothing'})"
    for what, name, value, chips in said:
        if chips(value) > here:
            raise ConfigError(
                f"{what.format(name)} {value!r}, {chips(value)} chips, of which {here} are here, but no other host was found: "
                f"{looked}; expected one of these, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
                "JAX_NUM_PROCESSES=1 for this host by itself"
            )


def _topology_chips(topology: str) -> int:
    """Of "4x4"; 0 if it is something else."""
    return math.prod(map(int, topology.split("x"))) if re.fullmatch(r"\d+(x\d+)*", topology) else 0


def _type_chips(kind: str) -> int:
    """Of "v5litepod-16"; 0 if it is something else."""
    number = re.fullmatch(r"[a-z0-9]+-(\d+)", kind)
    return int(number[1]) // (2 if _OF_CORES.fullmatch(kind) else 1) if number else 0


def tpu_table() -> dict[str, str]:
    """The metadata `tpu-env`, lines such as "ACCELERATOR_TYPE: 'v6e-16'"; empty if there is none."""
    pairs = (line.partition(":") for line in metadata("tpu-env").splitlines())
    return {name.strip(): value.strip().strip("'\"") for name, colon, value in pairs if colon}


def metadata(name: str) -> str:
    """An attribute of this machine of Google Compute Engine; empty if there is none, or no such machine."""
    url = f"http://{os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')}/computeMetadata/v1/instance/attributes/{name}"
    try:
        with open_metadata(url, timeout=10) as answer:
            return answer.read().decode(errors="replace").strip()
    except OSError:
        return ""
