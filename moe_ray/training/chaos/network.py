"""A network to the run's object store that can be cut."""

from urllib.parse import parse_qsl, urlencode, urlsplit

from moe_ray.training.chaos.proxy import Proxy


def insert_proxy(storage: str, host: str) -> tuple[str, Proxy | None]:
    """The same storage reached through a proxy of this process, where the protocol lets one in between.

    Args:
        storage: `train.storage`.
        host: address of this machine that all workers reach.
    """
    parts = urlsplit(storage)
    settings = dict(parse_qsl(parts.query))
    # Certificates are of the server's name, not of the proxy's.
    if parts.scheme != "s3" or settings.get("scheme") != "http" or "endpoint_override" not in settings:
        return storage, None
    server, _, port = settings["endpoint_override"].rpartition(":")
    if not server:
        server, port = port, "80"
    proxy = Proxy((server, int(port)), host)
    settings["endpoint_override"] = f"{host}:{proxy.port}"
    return parts._replace(query=urlencode(settings, safe=":/")).geturl(), proxy
