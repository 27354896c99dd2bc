"""How files of observations get into the bucket: each by one PUT, which may be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Put = Callable[[str, bytes], None]
"""Write a file, by its name below the model's prefix. Raises whatever it likes, and is called again later."""


def put_once(client: Any, bucket: str, key: str, body: bytes, conditional: bool = True) -> bool:
    """Write an object that is named by its content, in one PUT; one that is there already is the same.

    Args:
        client: boto3's.
        bucket: its name.
        key: of the object.
        body: its bytes.
        conditional: whether the store is asked not to write it a second time, which would make it newer.

    Returns:
        Whether the store knows that condition.

    Raises:
        Exception: what the client raises.
    """
    condition = {"IfNoneMatch": "*"} if conditional else {}
    try:
        client.put_object(Bucket=bucket, Key=key, Body=body, **condition)
    except client.exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if conditional and status in (400, 501):
            client.put_object(Bucket=bucket, Key=key, Body=body)
            return False
        if status != 412:
            raise
    return conditional
