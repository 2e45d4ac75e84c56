"""What a client gets that asked for something it cannot have: OpenAI's error object."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer with an HTTP status other than 200. `param` is the field of the request that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
