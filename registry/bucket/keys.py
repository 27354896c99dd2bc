"""Where things lie in the bucket.

models/<model>/releases/<release>/<file>…              immutable
models/<model>/releases/<release>/MANIFEST.json        written last: where it is, every file is
models/<model>/releases/<release>/MANIFEST.<key>.sig.json   its signature, where a key is set
models/<model>/releases/<release>/reports/<time>-<flow run>.html   what a run that made it did
models/<model>/channels/<channel>.json                 the pointer, what a reader follows
models/<model>/rules/<channel>.json                    what a move of it takes; see channels/rules.py
models/<model>/history/<channel>/<generation>.json     one copy of the pointer for each move, immutable
models/<model>/rollouts/<channel>.json                 the rollout beside the pointer; see registry/rollouts/
models/<model>/rollouts/<channel>/<generation>-<number>.json   one copy of it for each version, immutable
models/<model>/decisions/<channel>/<time>-<flow run>.json   what retraining decided, and why; immutable
models/<model>/tombstones/<release>.json               whether `ship gc` has marked or deleted a release
models/<model>/claims/<release>.json                   who needed a release last, whatever `ship gc` has marked
models/<model>/projects/<sha256>/…                     sent to workers by `ship deploy`; see bucket/projects.py
models/<model>/views/<channel>/…                       copies for other servers; see registry/serving/layouts.py
"""

from __future__ import annotations

import re

from shipreader.records import FILES, NAME, stays_below
from train_and_ship.registry.identity import is_release_id, require_name, require_release_id

VIEW_CONFIG = "config.pbtxt"
"""What names the release of a view; `ship view` writes it beside the folder of the version."""
_VIEW = rf"{NAME.pattern}/(?:triton|kserve/[1-9][0-9]{{0,7}})/"
"""Below `views_prefix`: channel and layout, which holds a folder with the model's name."""
_VERSION_FILE = re.compile(rf"[1-9][0-9]{{0,7}}/(?:model\.onnx|model\.py|(?P<shipped>{FILES}/.+))", re.DOTALL)


def releases_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/releases/"


def channels_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/channels/"


def histories_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/history/"


def rollouts_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/rollouts/"


def tombstones_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/tombstones/"


def claims_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/claims/"


def projects_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/projects/"


def views_prefix(model: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/views/"


def is_of_view(model: str, key: str) -> bool:
    """Whether `ship view` writes an object of this key; see registry/serving/layouts.py."""
    if (name := _in_view(model, key)) is None:
        return False
    found = _VERSION_FILE.fullmatch(name)
    return name == VIEW_CONFIG or (found is not None and (not found["shipped"] or stays_below(found["shipped"])))


def is_view_config(model: str, key: str) -> bool:
    """Whether it is the configuration of a view. What a job ships beside the model may be called like one."""
    return _in_view(model, key) == VIEW_CONFIG


def _in_view(model: str, key: str) -> str | None:
    """What follows the model's folder in a key of a view."""
    found = re.match(rf"{_VIEW}{re.escape(model)}/", key.removeprefix(views_prefix(model)))
    return key.removeprefix(views_prefix(model))[found.end() :] if found is not None else None


def release_prefix(model: str, release: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"{releases_prefix(model)}{require_release_id(release)}/"


def in_release(model: str, key: str) -> tuple[str, str] | None:
    """The release and the name in it of a key below `releases_prefix`; None for one that is of no release."""
    release, slash, name = key.removeprefix(releases_prefix(model)).partition("/")
    return (release, name) if slash and is_release_id(release) else None


def reports_prefix(model: str, release: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"{release_prefix(model, release)}reports/"


def pointer_key(model: str, channel: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"{channels_prefix(model)}{require_name('channel', channel)}.json"


def rules_key(model: str, channel: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/rules/{require_name('channel', channel)}.json"


def history_prefix(model: str, channel: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"{histories_prefix(model)}{require_name('channel', channel)}/"


def decisions_prefix(model: str, channel: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"models/{require_name('model', model)}/decisions/{require_name('channel', channel)}/"


def rollout_key(model: str, channel: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"{rollouts_prefix(model)}{require_name('channel', channel)}.json"


def rollout_versions_prefix(model: str, channel: str) -> str:
    """Raises RequestError for names that cannot be part of a key."""
    return f"{rollouts_prefix(model)}{require_name('channel', channel)}/"
