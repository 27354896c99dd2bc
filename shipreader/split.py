"""Which release answers while a candidate is tried: the slot of a request's key, the same in every language.

slot = (first 4 bytes, big-endian, of SHA-256(model in UTF-8 + a zero byte + key in UTF-8)) * 10000 >> 32

The candidate answers where the slot is below the share. A larger share takes in the smaller one, and the release is not
part of it: the same person has the same slot in each rollout of a model. docs/serving.md has test vectors.
"""

from __future__ import annotations

import hashlib
from numbers import Integral

SLOTS = 10_000
"""A share is so many of them: 1 is a hundredth of a percent."""
LONGEST_KEY = 1024
"""UTF-8 bytes. A longer key is none."""


def slot_of(model: str, key: object) -> int | None:
    """0 to 9,999, or None for what is no key: the live release answers then.

    A key is a text of 1 to 1,024 bytes in UTF-8, as it stands: nothing is trimmed, folded or normalised. An integer is
    its decimal digits. Everything else is no key: None, a boolean, a fraction, half a surrogate pair.
    """
    if not isinstance(key, str):
        if not isinstance(key, Integral) or isinstance(key, bool) or int(key).bit_length() > 4 * LONGEST_KEY:
            return None
        key = str(int(key))
    if not 0 < len(key) <= LONGEST_KEY:
        return None
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return None
    if len(encoded) > LONGEST_KEY:
        return None
    digest = hashlib.sha256(model.encode() + b"\0" + encoded).digest()
    return int.from_bytes(digest[:4], "big") * SLOTS >> 32
