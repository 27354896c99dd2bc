"""What a reader raises. Whatever it is, the release that was good before stays where it is.

ReaderError
├── UnavailableError      the bucket did not answer, or did not let us in: the same call can succeed later
│   └── NothingLiveError  it answered, and nothing is live on this channel
├── StoppedError          a download was given up for something that cannot wait
└── RefusedError          what the bucket holds is not to be used: altered, unsigned, too big, or older than ours
"""

LONGEST = 4000
"""Characters of a message that are kept."""


class ReaderError(Exception):
    """Base of what a reader raises on purpose, and itself: a mistake in how it was set up."""

    def __init__(self, message: str = "") -> None:
        # It quotes what is in the bucket, and goes to terminals and logs.
        text = "".join(
            char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in message[:LONGEST]
        )
        super().__init__(text)


class UnavailableError(ReaderError):
    """The bucket did not answer, or answered with a fault."""


class NothingLiveError(UnavailableError):
    """The channel has no pointer: it was never moved, or somebody deleted it."""


class StoppedError(ReaderError):
    """A candidate's files are not brought to the end now: the channel moved, or the reader is being closed."""


class RefusedError(ReaderError):
    """The release or the pointer breaks a promise. The message says what was expected and what was found."""
