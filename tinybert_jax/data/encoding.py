"""Text files that are not UTF-8: which encoding it probably is, and the command that converts them.

Nothing is converted in passing: bytes of a guessed encoding would become wrong text unnoticed.
"""

import re
import shlex
from pathlib import Path

from tinybert_jax.data.errors import fail

_MARKS = (b"\xff\xfe", b"\xfe\xff")  # the byte-order marks of UTF-16


def check_utf16(path: str, content: bytes) -> None:
    """Raises ValueError for UTF-16, also where its bytes are UTF-8 too: letters and zeros."""
    if content[:2] in _MARKS:
        _fail(path, "UTF-16", "its first two bytes say so")
    start = content[:100]
    for encoding, zeros, letters in (
        ("UTF-16LE", start[1::2], start[::2]),
        ("UTF-16BE", start[::2], start[1::2]),
    ):
        if zeros and not any(zeros) and letters.count(0) < len(letters) / 2:
            _fail(path, encoding, "every other byte is 0")


def _fail(path: str, encoding: str, sign: str) -> None:
    fail(path, "UTF-8", f"UTF-16 ({sign})", _conversion(path, encoding))


def conversion_of_bytes(path: str, content: bytes) -> str:
    """The fix for bytes that are no UTF-8."""
    # Latin-1 has no signs at 0x80 to 0x9f; Windows has quotes, dashes and the euro there.
    encoding = "WINDOWS-1252" if re.search(rb"[\x80-\x9f]", content) else "LATIN1"
    return f"if it is {encoding}: {_conversion(path, encoding)}"


def _conversion(path: str, encoding: str) -> str:
    """The command that writes the file in UTF-8 under another name."""
    new = Path(path).with_stem(f"{Path(path).stem}-utf8")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(str(new))}"
