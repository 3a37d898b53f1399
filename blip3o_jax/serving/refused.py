"""Refuse a request of an HTTP service in one line."""

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response


class Refused(Exception):
    """Answer a request with `status` and one line, {"error": line}. 429 and 503 get a Retry-After
    of 1 s unless `headers` has one."""

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None):
        super().__init__(status, line, headers)  # `args`, which pickle calls the class with
        self.status = status
        self.line = " ".join(line.split())  # one line, whatever text it quotes
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", "1")

    def __str__(self) -> str:
        return self.line


def refusal(refused: Refused) -> Response:
    """Return the response to a refused request, {"error": its line}."""
    return JSONResponse({"error": refused.line}, refused.status, refused.headers)
