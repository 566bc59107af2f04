"""Google Cloud's TPU API on this machine, for gcloud, and the machines that it starts: they run their start-up scripts here.

A queued resource becomes ACTIVE when it has been listed once, and its nodes start: a node is one host, a process group of this
machine with a metadata server and folders of its own. What is not there: other hosts of a node, TPUs, and waiting in queues.
"""

import contextlib
import datetime
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.parse

_RESOURCES = re.compile(r"/v2/projects/([\w-]+)/locations/([\w-]+)/queuedResources(?:/([\w-]+))?$")
_METADATA = re.compile(r"/([\w-]+)/computeMetadata/v1/instance/(.+)$")
_DISK, _MOUNTS = "/var/lib/mimic-video", "/gcs"  # folders of hosts, in the start-up scripts


class Cloud:
    """The API, from when it is made.

    Attributes:
        requests: "METHOD state of a resource" of all that was asked for, but for lists.
        refusals: (HTTP status, body) of the next requests for a machine.
        moved: other paths in start-up scripts, and what is put in their places.
    """

    def __init__(self, folder, environment):
        self.folder, self.environment = pathlib.Path(folder), environment
        self.requests, self.refusals, self.moved = [], [], {}
        self.resources, self.nodes, self.preempted = {}, {}, set()
        self._lock, self._count = threading.RLock(), 0
        cloud = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(cloud.get)

            def do_POST(self):
                self._answer(cloud.create)

            def do_DELETE(self):
                self._answer(cloud.delete)

            def _answer(self, method):
                url = urllib.parse.urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, content = method(url.path, dict(urllib.parse.parse_qsl(url.query)), body)
                content = content if isinstance(content, str) else json.dumps(content)
                with contextlib.suppress(ConnectionError):  # a process that was killed
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.nodes):
            self._kill(name)
        self._server.shutdown()

    def get(self, path, query, _):
        if match := _METADATA.match(path):
            return self._metadata(*match.groups(), query)
        with self._lock:
            answer = {"queuedResources": [dict(each) for each in self.resources.values()]}
            for name, resource in list(self.resources.items()):
                match resource["state"]["state"]:
                    case "PROVISIONING":
                        resource["state"] = {"state": "ACTIVE"}
                        self._start(name, resource)
                    case "DELETING":
                        del self.resources[name]
        return 200, answer

    def create(self, path, query, body):
        name = query["queuedResourceId"]
        with self._lock:
            self.requests.append(f"create {name}")
            if self.refusals:
                return self.refusals.pop(0)
            if name in self.resources:
                return 409, {"error": {"code": 409, "status": "ALREADY_EXISTS", "message": f"{name} exists"}}
            project, zone, _ = _RESOURCES.match(path).groups()
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
            self.resources[name] = json.loads(body) | {
                "name": f"projects/{project}/locations/{zone}/queuedResources/{name}",
                "createTime": now,
                "state": {"state": "PROVISIONING"},
            }
        return 200, {"name": f"projects/{project}/locations/{zone}/operations/create", "done": False}

    def delete(self, path, query, _):
        project, zone, name = _RESOURCES.match(path).groups()
        with self._lock:
            self.requests.append(f"delete {name} which is {self.resources[name]['state']['state']}")
            assert query["force"].lower() == "true"
            self._end(name, "DELETING")
        return 200, {"name": f"projects/{project}/locations/{zone}/operations/delete", "done": False}

    def preempt(self, name, notice=0.0):
        """Takes the machine of a queued resource away, `notice` seconds after it has been told."""
        with self._lock:
            self.preempted |= set(self._nodes(name)) if notice else set()
        end = time.monotonic() + notice
        while time.monotonic() < end and any(self.nodes[node].poll() is None for node in self._nodes(name)):
            time.sleep(0.1)
        with self._lock:
            self._end(name, "SUSPENDED")

    def _end(self, name, state):
        for node in self._nodes(name):
            self._kill(node)
        self.resources[name]["state"] = {"state": state}

    def _kill(self, node):
        process = self.nodes.pop(node)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _nodes(self, name):
        return [node for node in self.nodes if node.startswith(f"{name}-node")]

    def _spec(self, name):
        return self.resources[name]["tpu"]["nodeSpec"][0]

    def _start(self, name, resource):
        spec = self._spec(name)
        count = spec.get("multisliceParams", {}).get("nodeCount", 1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            peers = f"127.0.0.1:{free.getsockname()[1]}"
        for index in range(count):
            self._count += 1
            node = f"{name}-node{self._count}"
            folder = self.folder / node
            script = spec["node"]["metadata"]["startup-script"]
            for place, own in ({_DISK: folder / "disk", _MOUNTS: self.folder / "mounts"} | self.moved).items():
                script = script.replace(place, str(own))
            folder.mkdir(parents=True)
            (folder / "startup.sh").write_text(script)
            several = {"JAX_COORDINATOR_ADDRESS": peers, "JAX_PROCESS_ID": str(index)} if count > 1 else {}
            environment = (
                self.environment
                | several
                | {
                    "JAX_NUM_PROCESSES": str(count),
                    "GCE_METADATA_HOST": f"127.0.0.1:{self.port}/{node}",
                }
            )
            self.nodes[node] = subprocess.Popen(
                ["bash", folder / "startup.sh"], cwd=folder, env=environment, start_new_session=True
            )

    def _metadata(self, node, key, query):
        match key:
            case "name":
                return 200, node
            case "service-accounts/default/token":
                return 200, {"access_token": "none", "expires_in": 3600, "token_type": "Bearer"}
            case "maintenance-event" | "preempted":
                end = time.monotonic() + (float(query.get("timeout_sec", 0)) if "wait_for_change" in query else 0)
                while True:
                    gone = key == "preempted" and node in self.preempted
                    if gone or time.monotonic() >= end:
                        return 200, ("TRUE" if gone else "FALSE") if key == "preempted" else "NONE"
                    time.sleep(0.1)
        return 404, ""


def environment(folder, port):
    """What gcloud needs to find the API, and nothing else of this machine."""
    return {
        "CLOUDSDK_CONFIG": str(folder),
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{port}/",
        "CLOUDSDK_CORE_PROJECT": "a-project",
        "CLOUDSDK_COMPUTE_ZONE": "a-zone",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
