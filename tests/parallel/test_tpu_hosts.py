"""How the hosts of TPU slices find each other; no TPU is needed, and the metadata come from a server of the test."""

import http.server
import os
import threading

import jax
import pytest
from jax._src import cloud_tpu_init, hardware_utils

from mimic_video.config import ConfigError
from mimic_video.parallel.distributed import initialize

NOT_FOUND = ValueError("coordinator_address should be defined.")  # what JAX says where it knows none of its clusters


@pytest.fixture
def calls(monkeypatch):
    """A TPU host of four chips; what JAX was called with is collected, and an exception in `calls.fails` is raised."""

    class Calls(list):
        fails = None

        def __call__(self, *arguments, **_):
            self.append(arguments)
            if self.fails and not arguments:
                raise self.fails

    calls = Calls()
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, None))
    monkeypatch.setattr(jax.distributed, "initialize", calls)
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")  # there is no such server
    return calls


@pytest.fixture
def attributes(monkeypatch, calls):
    """The metadata of this machine, by name."""
    values = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(404 if value is None or self.headers["Metadata-Flavor"] != "Google" else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        yield values
        server.shutdown()


@pytest.mark.parametrize("name", ["TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"])
def test_a_pod_that_is_told_of_its_peers_joins_them(calls, tmp_path, name):
    value = "10.0.0.1:8476,10.0.0.2:8476"
    if name.endswith("PATH"):
        (tmp_path / "addresses").write_text(f" {value}\n")
        value = str(tmp_path / "addresses")
    environment = {name: value, "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
    initialize(environment)
    assert calls == [()]
    if name.endswith("PATH"):
        assert os.environ["TPU_PROCESS_ADDRESSES"] == "10.0.0.1:8476,10.0.0.2:8476"
    with pytest.raises(ConfigError, match="TPU_WORKER_ID is ''; expected a number from 0 to 1"):
        initialize(environment | {"TPU_WORKER_ID": ""})


def test_a_file_of_addresses_that_is_not_there_or_empty_is_named(calls, tmp_path):
    path = tmp_path / "addresses"
    with pytest.raises(ConfigError, match=r"TPU_PROCESS_ADDRESSES_PATH is '.*addresses', which cannot be read: .*No such file"):
        initialize({"TPU_PROCESS_ADDRESSES_PATH": str(path), "TPU_WORKER_HOSTNAMES": "a,b"})
    path.write_text(" \n")
    with pytest.raises(ConfigError, match=r"TPU_PROCESS_ADDRESSES_PATH is '.*addresses', an empty file; expected host:port"):
        initialize({"TPU_PROCESS_ADDRESSES_PATH": str(path), "TPU_WORKER_HOSTNAMES": "a,b"})


@pytest.mark.parametrize("environment", [{"MEGASCALE_NUM_SLICES": "2"}, {}])
def test_what_jax_finds_by_itself_is_left_to_it(calls, environment):
    initialize(environment)
    assert calls == [()]


def test_hosts_of_an_instance_group_find_each_other(calls, attributes):
    calls.fails = NOT_FOUND
    attributes |= {"worker-id": "1", "tpu-env": "TOPOLOGY: '2x2x2'\nWORKER_NETWORK_ENDPOINTS: 'a:0:10.0.0.1,b:1:10.0.0.2'\n"}
    initialize({})
    assert calls == [(), ("10.0.0.1:8482", 2, 1)]


@pytest.mark.parametrize(
    ("environment", "found", "message"),
    [
        (
            {"TPU_TOPOLOGY": "4x4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"},
            {},
            "environment variable TPU_TOPOLOGY is '4x4', 16 chips, of which 4 are here, but no other host was found: looked for "
            "TPU_PROCESS_ADDRESSES_PATH, TPU_PROCESS_ADDRESSES, TPU_WORKER_HOSTNAMES, and asked no metadata, .*; expected one",
        ),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, {}, "TPU_ACCELERATOR_TYPE is 'v5litepod-8', 8 chips, of which 4 are here"),
        (
            {},
            {"tpu-env": "TOPOLOGY: '2x2x2'\nZONE: 'z'"},
            r"TOPOLOGY of the metadata tpu-env is '2x2x2', 8 chips.*has TOPOLOGY, ZONE\)",
        ),
        ({}, {"accelerator-type": "v5p-16", "worker-id": "0"}, "the metadata accelerator-type is 'v5p-16', 8 chips"),
    ],
)
def test_a_host_of_several_that_finds_no_other_does_not_train_alone(calls, attributes, environment, found, message):
    calls.fails = NOT_FOUND
    attributes |= found
    with pytest.raises(ConfigError, match=message):
        initialize(environment)
    initialize(environment | {"JAX_NUM_PROCESSES": "1"})  # it is asked to


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {}),
        ({"TPU_TOPOLOGY": "2x2", "TPU_WORKER_HOSTNAMES": "localhost"}, {}),
        ({}, {"tpu-env": "TOPOLOGY: '2x2x1'", "accelerator-type": "v5p-8", "worker-id": "0"}),
        ({"TPU_TOPOLOGY": "2x4", "TPU_VISIBLE_CHIPS": "0", "TPU_PROCESS_BOUNDS": "1,1,1"}, {}),
    ],
)
@pytest.mark.parametrize("failure", [NOT_FOUND, ConnectionError("no metadata server")])
def test_one_host_trains_alone(calls, attributes, environment, found, failure):
    calls.fails = failure
    attributes |= found
    initialize(environment)
    assert calls in ([()], [])
