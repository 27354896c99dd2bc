"""Addresses without the secrets that some of them carry. Whatever is shown, logged or published goes through here.

They stand before the host (`https://user:password@host`), or in the query or fragment under a name that says so
(`?token=…`, `?X-Amz-Signature=…`, `#access_token=…`), where presigned addresses have them.
"""

from __future__ import annotations

import hashlib
import re

HIDDEN = "***"

_USER = re.compile(r"(?<=://)[^\s/?#\"'<>\\]*@")
_PASSWORD = re.compile(r"://[^\s/?#\"'<>\\:]*:[^\s/?#\"'<>\\]+@")
# `tokens` and `tokenizer` are no secrets, and `key` is one by itself or behind what says of what. A name is taken once,
# without trying where in it the secret's word may stand: a name of many such words would take as long as their square.
_NAME = (
    r"(?:(?=[\w.\[\]-]*?(?:token(?!s\b|iz)|secret|passw|passphrase|pwd|signature|credential|apikey|accesskey))"
    r"[\w.\[\]-]++"
    r"|(?:[\w.-]*[_.-])?(?:sig|pass|pw|auth|authorization|sas|hmac|jwt|session(?:[_.-]?id)?)"
    r"|(?:(?:api|access|auth|account|shared|storage|private|subscription|x|client)[_.-])*key"
    r"|x-(?:amz|goog|oss|cos|obs)-[\w-]+|awsaccesskeyid|googleaccessid|ossaccesskeyid)"
)
# In the middle of a text, also where `?`, `&`, `#` and `=` are escaped as in an address within an address. A bracket at
# the end of a value is the text's own.
_QUERY = re.compile(
    rf"((?:[?&#]|%3F|%26|%23)(?:amp;|amp%3B)?{_NAME}(?:=|%3D))((?:(?!%26)[^\s&#\"'<>\\`|)\]}}]|[)\]}}](?=[^\s&#\"'<>\\`|)\]}}.,]))+)",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """The text without the secrets of every address in it: `https://host/path?token=***`."""
    shown = _USER.sub("", text) if "@" in text else text
    if "=" in shown or "%3D" in shown or "%3d" in shown:
        shown = _QUERY.sub(lambda found: found[1] + HIDDEN, shown)
    return shown


def has_password(text: str) -> bool:
    """Whether an address in it carries a secret; a bare user, as in `ssh://git@host`, is none."""
    return _PASSWORD.search(text) is not None or ("://" in text and without_password(text) != _USER.sub("", text))


def without_credentials(address: str) -> str:
    """One address as messages may show it, without a slash at the end."""
    return without_password(address).rstrip("/")


def recognisable(text: str) -> str:
    """The text without passwords, and other when they are: to notice that one has changed."""
    shown = without_password(text)
    return shown if shown == text else f"{shown} (password {hashlib.sha256(text.encode()).hexdigest()[:8]})"
