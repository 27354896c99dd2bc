"""Signatures of AWS, version 4, as S3 has them: made for one request, and checked.

As in "Signature Calculations for the Authorization Header" and "Query Parameters" of the S3 API reference. What a body
is is said by its hash, which the signature covers; the body itself is not read here.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote_to_bytes, urlsplit

ALGORITHM = "AWS4-HMAC-SHA256"
NO_BODY = hashlib.sha256(b"").hexdigest()
UNSIGNED = "UNSIGNED-PAYLOAD"
SKEW = timedelta(minutes=15)
"""How far the clocks of both sides may be apart."""
LONGEST = 7 * 24 * 3600
"""Seconds that an address with a signature may be good for."""

_HEADER = re.compile(rf"{ALGORITHM} +Credential=([^ ,]+) *, *SignedHeaders=([^ ,]+) *, *Signature=([0-9a-f]{{64}}) *")
_TOO_OLD = f"The authorization mechanism you have provided is not supported. Please use {ALGORITHM}."
_MOMENT = re.compile(r"\d{8}T\d{6}Z")


class RefusedError(Exception):
    """A request without a good signature."""

    def __init__(self, code: str, said: str, status: int = 403) -> None:
        super().__init__(said)
        self.code = code
        """As S3 calls it."""
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is signed of a request."""

    method: str
    path: bytes
    """As it was sent, with its percent signs."""
    query: bytes
    """As it was sent, without the question mark."""
    headers: Sequence[tuple[bytes, bytes]]
    """Names in small letters."""


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What a request says of its signature."""

    credential: str
    signed: str
    signature: str
    moment: str
    """`20261130T015900Z`."""
    seconds: int | None
    """How long it is good for; None for SKEW in both directions."""
    payload: str
    """Hash of the body, or one of the words that stand for it."""


def check(request: Request, key: str, secret: str, now: datetime) -> None:
    """Check who signed a request.

    Args:
        request: as it was received.
        key: the access key.
        secret: of that key.
        now: in UTC.

    Raises:
        RefusedError: it is not signed with key and secret, or for another time; with the code that S3 has for it.
    """
    pairs = _pairs(request.query)
    claim = _claim(request, dict(pairs))
    given, *scope = claim.credential.rsplit("/", 4)
    if len(scope) != 4 or not _MOMENT.fullmatch(claim.moment):
        raise RefusedError("AuthorizationHeaderMalformed", "The credential or the date is not one of version 4.", 400)
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise RefusedError("InvalidAccessKeyId", "The access key is not the one of this server.")
    _require_in_time(claim, now)
    names = claim.signed.split(";")
    unsigned = {name.decode("latin-1") for name, _ in request.headers if name.startswith(b"x-amz-")} - set(names)
    if "host" not in names or unsigned:
        raise RefusedError("AccessDenied", "There were headers in the request which were not signed.")
    expected = signature(
        secret,
        request,
        # The signature itself is in the address of one that is signed there.
        pairs=[pair for pair in pairs if pair[0] != "X-Amz-Signature"],
        names=names,
        payload=claim.payload,
        moment=claim.moment,
        scope=scope,
    )
    of_this_day = scope[0] == claim.moment[:8] and scope[2:] == ["s3", "aws4_request"]
    if not hmac.compare_digest(expected.encode(), claim.signature.encode()) or not of_this_day:
        raise RefusedError(
            "SignatureDoesNotMatch", "The signature is not the one of the secret of this server; check key and secret."
        )


def signature(
    secret: str,
    request: Request,
    *,
    pairs: Iterable[tuple[str, str]],
    names: Sequence[str],
    payload: str,
    moment: str,
    scope: Sequence[str],
) -> str:
    """The signature of a request, in hexadecimal.

    Args:
        secret: of the access key.
        request: what is signed.
        pairs: its query, decoded, without the signature.
        names: of the headers that are signed.
        payload: hash of the body, or one of the words that stand for it.
        moment: `20261130T015900Z`.
        scope: date, region, service and `aws4_request`.
    """
    canonical = [
        request.method.encode(),
        quote(unquote_to_bytes(request.path), safe="/").encode() or b"/",
        "&".join(sorted(f"{_quoted(name)}={_quoted(value)}" for name, value in pairs)).encode(),
        *(name.encode() + b":" + _values(request.headers, name.encode()) for name in names),
        b"",
        ";".join(names).encode(),
        payload.encode(),
    ]
    digest = hashlib.sha256(b"\n".join(canonical)).hexdigest()
    said = "\n".join((ALGORITHM, moment, "/".join(scope), digest))
    return hmac.new(_signing_key(secret, *scope), said.encode(), hashlib.sha256).hexdigest()


def signed_get(url: str, key: str, secret: str, now: datetime) -> Mapping[str, str]:
    """The headers of a signed GET, without a client of AWS.

    Args:
        url: with an encoded path and query.
        key: the access key.
        secret: of that key.
        now: in UTC.
    """
    parts = urlsplit(url)
    moment = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": parts.netloc, "x-amz-content-sha256": NO_BODY, "x-amz-date": moment}
    request = Request(
        method="GET",
        path=parts.path.encode(),
        query=parts.query.encode(),
        headers=[(name.encode(), value.encode()) for name, value in headers.items()],
    )
    names, scope = sorted(headers), (moment[:8], "us-east-1", "s3", "aws4_request")
    made = signature(
        secret, request, pairs=_pairs(request.query), names=names, payload=NO_BODY, moment=moment, scope=scope
    )
    credential = "/".join((key, *scope))
    authorization = f"{ALGORITHM} Credential={credential}, SignedHeaders={';'.join(names)}, Signature={made}"
    return {**headers, "authorization": authorization}


def _claim(request: Request, query: Mapping[str, str]) -> _Claim:
    """Where the signature is, in the headers or in the address. Raises RefusedError where there is none."""
    given = _one(request.headers, b"authorization")
    if given is not None:
        found = _HEADER.fullmatch(given)
        if found is None:
            raise RefusedError("InvalidRequest", _TOO_OLD, 400)
        payload = _one(request.headers, b"x-amz-content-sha256")
        if payload is None:
            raise RefusedError("InvalidRequest", "Missing required header for this request: x-amz-content-sha256", 400)
        moment = _one(request.headers, b"x-amz-date") or ""
        return _Claim(
            credential=found[1], signed=found[2], signature=found[3], moment=moment, seconds=None, payload=payload
        )
    if "X-Amz-Signature" not in query:
        if "AWSAccessKeyId" in query:
            raise RefusedError("InvalidRequest", _TOO_OLD, 400)
        raise RefusedError("AccessDenied", "Access Denied: the request is not signed.")
    seconds = query.get("X-Amz-Expires", "")
    if query.get("X-Amz-Algorithm") != ALGORITHM or not seconds.isascii() or not seconds.isdigit():
        raise RefusedError("AuthorizationQueryParametersError", f"Expected {ALGORITHM} and X-Amz-Expires.", 400)
    if not 0 < int(seconds[:10]) <= LONGEST:
        raise RefusedError("AuthorizationQueryParametersError", "X-Amz-Expires must be 1 to 604800 seconds.", 400)
    return _Claim(
        credential=query.get("X-Amz-Credential", ""),
        signed=query.get("X-Amz-SignedHeaders", ""),
        signature=query["X-Amz-Signature"],
        moment=query.get("X-Amz-Date", ""),
        seconds=int(seconds[:10]),
        payload=_one(request.headers, b"x-amz-content-sha256") or UNSIGNED,
    )


def _require_in_time(claim: _Claim, now: datetime) -> None:
    try:
        signed = datetime.strptime(claim.moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise RefusedError("AuthorizationHeaderMalformed", "The date of the request is no date.", 400) from None
    if signed - now > SKEW or (claim.seconds is None and now - signed > SKEW):
        raise RefusedError("RequestTimeTooSkewed", "The time of the request is more than 15 minutes from the server's.")
    if claim.seconds is not None and now > signed + timedelta(seconds=claim.seconds):
        raise RefusedError("AccessDenied", "Request has expired")


def _pairs(query: bytes) -> list[tuple[str, str]]:
    """Names and values of a query, decoded. A plus sign is one: S3 has %20 for a space."""
    found = (part.partition(b"=") for part in query.split(b"&") if part)
    # As bytes without loss, whatever they are in UTF-8.
    return [(_decoded(name), _decoded(value)) for name, _, value in found]


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="surrogateescape")


def _decoded(text: bytes) -> str:
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return b",".join(b" ".join(value.split()) for known, value in headers if known == name)


def _one(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The only header of that name. Raises RefusedError when there are several."""
    found = [value for known, value in headers if known == name]
    if len(found) > 1:
        raise RefusedError("InvalidRequest", f"Expected one header {name.decode()}, got {len(found)}.", 400)
    return found[0].decode("latin-1").strip() if found else None


@functools.lru_cache(maxsize=8)
def _signing_key(secret: str, *scope: str) -> bytes:
    """The same for all requests of a day."""
    made = f"AWS4{secret}".encode()
    for part in scope:
        made = hmac.new(made, part.encode(), hashlib.sha256).digest()
    return made
