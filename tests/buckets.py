"""A bucket of Google Cloud Storage on this machine, in another process, for test modules that ask for it.

Of what clients use, gcp-storage-emulator lacks moves, and the generations of objects, on which tensorstore's reads and writes
depend. Run as a script, this file is that emulator with both.
"""

import contextlib
import socket
import socketserver
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http import HTTPStatus

import pytest


@contextlib.contextmanager
def emulated_bucket():
    """Gives the bucket's URL; clients find it by the environment, as do processes that are started inside."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # of tensorstore, of gcsfs, and against the search for credentials, which asks a server in the network
    settings = {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "STORAGE_EMULATOR_HOST": url,
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    command = [sys.executable, __file__, str(port)]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            for name, value in settings.items():
                patch.setenv(name, value)
            _wait_for(f"{url}/storage/v1/b/bucket", server)
            yield "gs://bucket"
        finally:
            server.kill()


def _wait_for(url, server, seconds=30):
    for _ in range(10 * seconds):
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(url).close()
            return
        assert server.poll() is None, "the emulator ended"
        time.sleep(0.1)
    raise TimeoutError(url)


def _serve(port):
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(request, storage, name):
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    def conditional(handler):
        def handle(request, response, storage, *args, **kwargs):
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            now = generation(request, storage, name)
            if request.query.get("ifGenerationMatch", [now]) != [now]:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif request.query.get("ifGenerationNotMatch", [""]) == [now]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                response["x-goog-generation"] = now
                handler(request, response, storage, *args, **kwargs)

        return handle

    for name in ("insert", "get", "download", "delete"):
        setattr(objects, name, conditional(getattr(objects, name)))
    from gcp_storage_emulator import server  # which keeps the functions that it finds

    def move(request, response, storage):
        assert not request.data  # and read, or the client finds the connection broken
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        if response.status == HTTPStatus.OK:
            storage.delete_file(request.params["bucket_name"], request.params["object_id"])

    route = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"
    server.HANDLERS = ((route, {server.POST: move}), *server.HANDLERS)
    socketserver.TCPServer.request_queue_size = 128  # clients send many at a time
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
