"""What a reader raises. Whatever it is, the release that was good before stays where it is.

ReaderError
├── Unavailable   the bucket did not answer, or did not let us in: the same call can succeed later
└── Refused       what the bucket holds is not to be used: altered, unsigned, too big, or older than what we have
"""


class ReaderError(Exception):
    """Base of what a reader raises on purpose, and itself: a mistake in how it was set up."""


class Unavailable(ReaderError):
    """The bucket did not answer, answered with a fault, or has nothing on this channel."""


class Refused(ReaderError):
    """The release or the pointer breaks a promise. The message says what was expected and what was found."""
