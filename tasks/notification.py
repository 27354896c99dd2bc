"""A Prefect block with one address, or several, at which people are told something.

The Prefect server loads this through the entry point `prefect.collections`, so it has to be installed there too.
"""

from __future__ import annotations

from prefect.blocks.notifications import AppriseNotificationBlock
from pydantic import Field, SecretStr


class NotificationAddress(AppriseNotificationBlock):
    """Slack, e-mail, a webhook and a hundred others, each by its address for Apprise: https://appriseit.com"""

    _block_type_name = "Notification Address"
    _block_type_slug = "notification-address"

    url: SecretStr = Field(
        title="Addresses",
        description="One or more, separated by spaces.",
        examples=["slack://T1/B2/c3/#models mailtos://user:password@example.com?to=me@example.com"],
    )
