"""Whether the Hugging Face hub answers: its clients would retry for 23 s if it does not."""

import socket
import urllib.request
from urllib.parse import urlsplit

import huggingface_hub.constants


def answers() -> bool:
    """Whether its address accepts connections; also true behind a proxy, which finds it for us, and if the user has set
    HF_HUB_OFFLINE, so that the clients say so in their own words."""
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True


def stay_offline() -> None:
    """From here on nothing is downloaded; what has been before still loads."""
    import datasets  # late: weights are fetched without it

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
