"""Where things lie in the bucket.

models/<model>/releases/<release>/<file>…              immutable
models/<model>/releases/<release>/MANIFEST.json        written last: where it is, every file is
models/<model>/releases/<release>/MANIFEST.<key>.sig.json   its signature, where a key is set
models/<model>/channels/<channel>.json                 the pointer, the only key that is ever replaced
models/<model>/history/<channel>/<generation>.json     one copy of the pointer for each move, immutable
"""

from __future__ import annotations

from registry.release import require_name, require_release_id


def release_prefix(model: str, release: str) -> str:
    """Raises ReleaseError for names that cannot be part of a key."""
    require_name("model", model)
    require_release_id(release)
    return f"models/{model}/releases/{release}/"


def pointer_key(model: str, channel: str) -> str:
    """Raises ReleaseError for names that cannot be part of a key."""
    require_name("model", model)
    require_name("channel", channel)
    return f"models/{model}/channels/{channel}.json"


def history_prefix(model: str, channel: str) -> str:
    """Raises ReleaseError for names that cannot be part of a key."""
    require_name("model", model)
    require_name("channel", channel)
    return f"models/{model}/history/{channel}/"
