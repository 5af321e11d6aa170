"""JSON over HTTP to an inference server: time-outs, retries with back-off, and one clear error in the end."""

from __future__ import annotations

import json
import time
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError
from urllib3.util import Retry, Timeout

from ..schema import UserError

_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
_HANGS = 1
"""Times that a server may leave a request unanswered until the time-out before it is given up; each costs the time-out."""


class EngineError(UserError):
    """The engine is gone, hangs, or refuses: what it was asked for is lost, what was sampled before is not.

    Args:
        message: one line.
        status: of the HTTP answer, where there was one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Retry(Retry):
    """Of the retries after reading, which are few, a broken connection takes none: the server is gone and does not hang."""

    def increment(self, *asked: Any, error: Exception | None = None, **more: Any) -> _Retry:
        """The retries that are left after this one."""
        broken = isinstance(error, ProtocolError)
        left = Retry.increment(self.new(read=None) if broken else self, *asked, error=error, **more)
        return left.new(read=self.read) if broken else left


class Client:
    """A server at a URL, safe to call from several threads.

    Args:
        url: such as http://localhost:8000.
        timeout: seconds to wait for an answer.
        retries: attempts after the first, with pauses of 0, 1, 2, 4, ... seconds, 30 at most, between them: 8 wait for some
            90 seconds, in which a server can be started again.
        connections: requests at a time.
        who: begins every error; its first word is the section of the recipe that has the URL.
        secret: key that the server asks for; it stands in no error.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        retries: int,
        connections: int,
        who: str = "engine vllm",
        secret: str | None = None,
    ) -> None:
        self.url, self._who, self._secret = url.rstrip("/").removesuffix("/v1"), who, secret
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{who.split()[0]}.url = {url!r}: expected http://host:port")
        retry = _Retry(
            total=retries,
            read=min(_HANGS, retries),
            backoff_factor=0.5,
            backoff_max=_LONGEST_PAUSE,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,  # every method: asking again for the same completions does no harm
            raise_on_status=False,
        )
        self.retries, self.timeout = retries, timeout
        timeouts = Timeout(connect=_CONNECT_SECONDS, read=timeout)
        headers = {"Authorization": f"Bearer {secret}"} if secret else None
        self._pool = urllib3.PoolManager(maxsize=connections, block=True, timeout=timeouts, retries=retry, headers=headers)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, hint: str = "") -> Any:
        """The JSON that a path answers with; None for an empty answer.

        Args:
            method: GET or POST.
            path: from the root of the server.
            body: sent as JSON.
            hint: what the user can do, for the error.

        Raises:
            EngineError: no answer, an answer that says no, or one that is not JSON.
        """
        began, asked = time.monotonic(), f"{self._who}: {method} {self.url}{path}"
        after = f"; {hint}" if hint else ""
        try:
            answer = self._pool.request(method, f"{self.url}{path}", json=body)
        except MaxRetryError as error:
            waited = f"after {time.monotonic() - began:.0f} s and {self.retries} retries"
            raise EngineError(f"{asked}: no answer {waited}: {_reason(error)}{after}") from None
        except HTTPError as error:
            raise EngineError(f"{asked}: {error}{after}") from None
        if answer.status != 200:
            raise EngineError(f"{asked}: status {answer.status}: {self._hidden(_message(answer.data))}{after}", answer.status)
        try:
            return answer.json() if answer.data else None
        except ValueError:
            raise EngineError(f"{asked}: answers with something that is not JSON{after}") from None

    def _hidden(self, text: str) -> str:
        """A server's words without the key, which some repeat where they refuse it."""
        return text.replace(self._secret, "...") if self._secret else text

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()


def _reason(error: MaxRetryError) -> str:
    """What was wrong the last time, without the addresses of objects."""
    text = str(error.reason) if error.reason is not None else "unknown"
    return text.rsplit(">: ", 1)[-1].rsplit("): ", 1)[-1]


def _message(data: bytes) -> str:
    """What a server says of its refusal: the message of OpenAI's error format, or the text."""
    try:
        got = json.loads(data)
        return str(got["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(data.decode(errors="replace").split())[:300] or "no reason given"
