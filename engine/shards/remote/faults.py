"""What an error of a remote service means: whether it may pass, when to ask again, what to say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

from ...basics.errors import MOST_TOLD, plain

NOT_THERE = 404  # HTTP statuses
BEYOND_THE_END = 416  # the file is no longer than what is here of it
_PASSING_STATUS = {408, 425, 429}
_HOPELESS = {
    "InsecureRedirectError",
    "InvalidURL",
    "InvalidUrlRedirectClientError",
    "NonHttpUrlRedirectClientError",
    "NoCredentialsError",
    "OfflineModeIsEnabled",
    "PartialCredentialsError",
}


class InsecureRedirectError(Exception):
    """A service reached by https sends on to a place that is not."""

    def __init__(self, target: str) -> None:
        super().__init__(
            f"redirected from https to {target} (anybody on the way could change what comes)"
        )


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the libraries."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may be granted later."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    return not isinstance(error, PermissionError) and type(error).__name__ not in _HOPELESS


_NO_CONNECTION = {"ClientConnectorError", "ClientConnectorDNSError", "ConnectError"} | {
    *("EndpointConnectionError", "OfflineModeIsEnabled", "ConnectionRefusedError", "gaierror"),
}


def not_connected(error: BaseException) -> bool:
    """Whether there was nobody to talk to, as where there is no network."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return any(kind.__name__ in _NO_CONNECTION for one in causes for kind in type(one).__mro__)


def asked_to_wait(error: BaseException) -> float:
    """Seconds for which the service asks not to be asked again (Retry-After), or 0.

    A date counts from the service's own, for clocks differ: without one it says nothing.
    """
    headers = getattr(error, "headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )
    if not isinstance(headers, Mapping):
        return 0.0
    asked = str(headers.get("Retry-After", "")).strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked):
        return float(asked)
    with suppress(ValueError, TypeError, OverflowError):
        until, now = (parsedate_to_datetime(text) for text in (asked, str(headers.get("Date"))))
        return max(0.0, (until - now).total_seconds())
    return 0.0


def reason_of(error: BaseException) -> str:
    """One line of bounded length without credentials."""
    status, asked = status_of(error), asked_to_wait(error)
    message = getattr(error, "message", None) or str(error)
    text = message if status is None or message.startswith(str(status)) else f"{status} {message}"
    text += f", asks for {asked:g} s" if asked else ""
    ours = isinstance(error, TimeoutError | InsecureRedirectError)
    kind = "" if ours or status else f"{type(error).__name__}: "
    return plain(" ".join(f"{kind}{text}".split()), MOST_TOLD) or type(error).__name__
