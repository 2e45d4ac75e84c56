"""Keys of endpoints: they come from the environment, and stay out of whatever anybody reads."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import cache
from typing import Any

from jaxalign.errors import UserError

KEY, OPENAI_KEY, OPENAI_HOST = "JAXALIGN_API_KEY", "OPENAI_API_KEY", "api.openai.com"
SECRET = 12  # letters from which on a key is cut out of answers too; `EMPTY` and the like may stand there


def variables(host: str) -> tuple[str, ...]:
    """The environment variables that may hold the key for a host, the first one first."""
    return (KEY, OPENAI_KEY) if host == OPENAI_HOST else (KEY,)


def key_for(host: str) -> tuple[str, str]:
    """The variable that holds the key for a host, and the key; twice "" where there is none. Raises
    `UserError` for a key that cannot be sent."""
    for variable in variables(host):
        key = os.environ.get(variable, "").strip()
        if key and not re.fullmatch(r"[!-~]+", key):
            cause = "the key holds blanks or letters that no HTTP header may have"
            remedy = "set it to the key alone, without quotes or line breaks"
            raise UserError(cause, place=variable, remedy=remedy)
        if key:
            _keep_out_of_logs(key)
            return variable, key
    return "", ""


def hidden(text: str, key: str) -> str:
    """The text without the key, as it is or as JSON may write it. To be called before a text is cut."""
    for form in {key, key.replace("/", "\\/"), json.dumps(key)[1:-1]} - {""}:
        text = text.replace(form, "***")
    return text


def without(value: Any, key: str) -> Any:
    """JSON whose texts do not hold the key; a short one may stand there by chance."""
    if len(key) < SECRET:
        return value
    if isinstance(value, str):
        return value.replace(key, "***")
    if isinstance(value, dict):
        return {without(name, key): without(inner, key) for name, inner in value.items()}
    return [without(inner, key) for inner in value] if isinstance(value, list) else value


@cache
def _keep_out_of_logs(key: str) -> None:
    """The HTTP library hides what it sends but, when it is debugged, not the headers that come back."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = hidden(record.getMessage(), key), None
        return True

    logging.getLogger("httpcore.http11").addFilter(hide)
