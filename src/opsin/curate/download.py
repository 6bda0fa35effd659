"""Download a file politely: over http and https only, bounded in time and bytes, tried again where that may help.

A site that answers with `X-Robots-Tag: noai` or `noimageai` does not want its images to be trained on, and is heeded.
"""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import lru_cache
from typing import Final

import opsin
from opsin.data.decode import DecodeError

SCHEMES: Final = ("http://", "https://")
"""What begins an address that can be fetched."""
LOST: Final = "no connection"
"""Begins the reason of a download that no server answered, or broke off."""
PIECE: Final = 1 << 16
"""Bytes that are read at once."""
_AGAIN: Final = (408, 425, 429, 500, 502, 503, 504)
_FORBIDS: Final = ("noai", "noimageai")


def download(url: str, *, timeout: float, retries: int, max_bytes: int) -> bytes:
    """The content behind an http or https address.

    Args:
        url: the address; letters that no URL may hold are quoted.
        timeout: seconds that one attempt may take.
        retries: new attempts after a lost connection or an overloaded server, after 1, 2, 4, … seconds.
        max_bytes: what is larger is given up.

    Raises:
        DecodeError: there is none to be had; the reason begins with what reasons are counted by.
    """
    if not url.lower().startswith(SCHEMES):
        raise DecodeError(url, "not an http or https address")
    for attempt in range(retries + 1):
        if attempt:
            _wait(2.0 ** (attempt - 1))
        try:
            return _answer(url, timeout, max_bytes)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code not in _AGAIN:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            text = getattr(error, "reason", None) or error
            reason = f"{LOST}: {' '.join(str(text).split())[:120] or type(error).__name__}"
            if isinstance(error, ValueError | http.client.InvalidURL):
                reason = f"not an http or https address: {error}"
                break
    raise DecodeError(url, reason)


def _answer(url: str, timeout: float, max_bytes: int) -> bytes:
    request = urllib.request.Request(
        urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": f"opsin/{opsin.__version__}"}
    )
    until = time.monotonic() + timeout
    with _opener().open(request, timeout=timeout) as answer:
        told = ", ".join(answer.headers.get_all("X-Robots-Tag") or ()).lower()
        if any(mark in told.replace(":", ",").replace(" ", "").split(",") for mark in _FORBIDS):
            raise DecodeError(url, "its site forbids training on it")
        pieces, held = list[bytes](), 0
        while piece := answer.read1(PIECE):
            pieces.append(piece)
            held += len(piece)
            if held > max_bytes:
                raise DecodeError(url, f"larger than {max_bytes:,} bytes")
            if time.monotonic() > until:
                raise TimeoutError(f"not done in {timeout:g} seconds")
        length = answer.headers.get("Content-Length", "")
        if length.isdigit() and held < int(length):
            raise ConnectionError(f"it broke off after {held:,} of {length} bytes")
        return b"".join(pieces)


def _wait(seconds: float) -> None:
    time.sleep(seconds)


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """What opens http and https only, also after a redirection: Python's own would follow one to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
