"""Reads JSON that anybody may have written, and says in a few words what is wrong with it."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value; raises ValueError with a short reason for all that is wrong with the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError:  # of int()
        raise ValueError("a number with too many digits") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_utf8(value: Any) -> bool:
    """Whether all text in a value of JSON can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True
