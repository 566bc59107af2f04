"""The metadata server of Google Compute Engine, which tells a machine about itself."""

import http.client
import urllib.request


def open_metadata(url: str, timeout: float) -> http.client.HTTPResponse:
    """Its answer. No proxy is asked, as it is on this very machine. Raises OSError, of which urllib's errors are kinds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=timeout)
