"""Addresses without the passwords that some of them carry. Whatever is shown, logged or published goes through here."""

from __future__ import annotations

import hashlib
import re

_USER = re.compile(r"(?<=://)[^\s/?#\"'<>\\]*@")
_PASSWORD = re.compile(r"://[^\s/?#\"'<>\\:]*:[^\s/?#\"'<>\\]+@")


def without_password(text: str) -> str:
    """The text without user and password of every address in it: `https://host/path`."""
    return _USER.sub("", text) if "@" in text else text


def has_password(text: str) -> bool:
    """Whether an address in it carries a password; a bare user, as in `ssh://git@host`, is none."""
    return _PASSWORD.search(text) is not None


def without_credentials(address: str) -> str:
    """One address as messages may show it, without a slash at the end."""
    return without_password(address).rstrip("/")


def recognisable(text: str) -> str:
    """The text without passwords, and other when they are: to notice that one has changed."""
    shown = without_password(text)
    return shown if shown == text else f"{shown} (password {hashlib.sha256(text.encode()).hexdigest()[:8]})"
