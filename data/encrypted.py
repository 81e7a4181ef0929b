"""Downloads come over encrypted connections only; plain http is for servers on this machine."""
from http.client import HTTPMessage
from typing import IO
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class UnencryptedAddress(OSError):
    """An address, or one that a server redirects to, that is neither https nor on this machine."""


def open_encrypted(url: str, headers: dict[str, str] | None = None, timeout: float = 60) -> IO[bytes]:
    """Open an address as `urllib.request.urlopen` does; every redirection must be encrypted, too.

    Raises UnencryptedAddress, before anything is sent to it, and what urllib raises.
    """
    check_encrypted(url)
    request = Request(url, headers={"User-Agent": "densekd"} | (headers or {}))
    return build_opener(_EncryptedRedirects).open(request, timeout=timeout)


class _EncryptedRedirects(HTTPRedirectHandler):
    """Follows no redirection to an unencrypted address."""

    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage,
                         newurl: str) -> Request | None:
        check_encrypted(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_encrypted(url: str) -> None:
    """Raises UnencryptedAddress for an address that is neither https nor on this machine."""
    address = urlparse(url)
    if address.scheme != "https" and not (address.scheme == "http" and address.hostname in _THIS_MACHINE):
        raise UnencryptedAddress(f"{' '.join(url.split())} is refused: it is not an https address, and anybody on the "
                                 "way could change the file; use https, or download and check the file yourself and "
                                 "give its path")
