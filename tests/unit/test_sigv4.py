"""Signatures of AWS as the local S3 server checks them, held against botocore, which makes them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from train_and_ship.infra.doors.sigv4 import RefusedError, Request, check, signed_get

KEY, SECRET = "ship", "s3cret"
TARGETS = [
    "/",
    "/models",
    "/models?list-type=2&prefix=a%2Fb&delimiter=%2F",
    "/models?uploads",
    "/models?versioning&a=&b=2&b=1",
    "/models/a%20b/%C3%BC%2B%3D%40~x.json?x-id=GetObject",
    "/models//twice//",
]


def sent(request: AWSRequest) -> Request:
    """As it goes over the wire."""
    prepared = request.prepare()
    parts = urlsplit(prepared.url)
    headers = [("host", parts.netloc), *prepared.headers.items()]
    return Request(
        method=prepared.method,
        path=parts.path.encode(),
        query=parts.query.encode(),
        headers=[
            (name.lower().encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers
        ],
    )


def by_header(target: str = "/models/a", method: str = "GET", secret: str = SECRET, key: str = KEY) -> AWSRequest:
    headers = {"x-amz-meta-a": " two   spaces ", "If-Match": '"1"'}
    request = AWSRequest(method, f"http://127.0.0.1:4566{target}", headers, b"body" if method == "PUT" else b"")
    S3SigV4Auth(Credentials(key, secret), "s3", "eu-north-1").add_auth(request)
    return request


def by_address(seconds: int = 60, target: str = "/models/a") -> AWSRequest:
    request = AWSRequest("GET", f"http://127.0.0.1:4566{target}")
    S3SigV4QueryAuth(Credentials(KEY, SECRET), "s3", "us-east-1", expires=seconds).add_auth(request)
    return request


def refused(request: Request, *, later: timedelta = timedelta(0)) -> str:
    with pytest.raises(RefusedError) as error:
        check(request, KEY, SECRET, datetime.now(UTC) + later)
    return error.value.code


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "DELETE"])
def test_what_botocore_signs_is_good(method: str, target: str) -> None:
    check(sent(by_header(target, method)), KEY, SECRET, datetime.now(UTC))


@pytest.mark.parametrize("target", TARGETS)
def test_addresses_that_botocore_signs_are_good_for_their_time(target: str) -> None:
    request = sent(by_address(60, target))
    check(request, KEY, SECRET, datetime.now(UTC))
    assert refused(request, later=timedelta(seconds=62)) == "AccessDenied"


@pytest.mark.parametrize("target", TARGETS)
def test_our_own_signature_of_a_get_is_good(target: str) -> None:
    headers = signed_get(f"http://127.0.0.1:4566{target}", KEY, SECRET, datetime.now(UTC))
    path, _, query = target.partition("?")
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    check(
        Request(method="GET", path=path.encode(), query=query.encode(), headers=pairs), KEY, SECRET, datetime.now(UTC)
    )


def altered(**changes: object) -> Request:
    return Request(**{**vars(sent(by_header())), **changes})


def with_header(name: str, value: str) -> Request:
    kept = [item for item in sent(by_header()).headers if item[0] != name.encode()]
    return altered(headers=[*kept, (name.encode(), value.encode())])


@pytest.mark.parametrize(
    ("signed", "code"),
    [
        (lambda: altered(headers=[(b"host", b"127.0.0.1:4566")]), "AccessDenied"),
        (lambda: sent(by_header(secret="other")), "SignatureDoesNotMatch"),
        (lambda: sent(by_header(key="other")), "InvalidAccessKeyId"),
        (lambda: altered(method="DELETE"), "SignatureDoesNotMatch"),
        (lambda: altered(path=b"/models/b"), "SignatureDoesNotMatch"),
        (lambda: altered(query=b"acl"), "SignatureDoesNotMatch"),
        (lambda: with_header("host", "other:4566"), "SignatureDoesNotMatch"),
        (lambda: with_header("x-amz-content-sha256", "0" * 64), "SignatureDoesNotMatch"),
        (lambda: with_header("x-amz-meta-a", "other"), "SignatureDoesNotMatch"),
        (lambda: with_header("x-amz-copy-source", "/models/secret"), "AccessDenied"),
        (lambda: with_header("x-amz-date", "20200101T000000Z"), "RequestTimeTooSkewed"),
        (lambda: with_header("x-amz-date", "20209901T000000Z"), "AuthorizationHeaderMalformed"),
        (lambda: with_header("authorization", "AWS ship:c2lnbmF0dXJl"), "InvalidRequest"),
        (lambda: with_header("authorization", "AWS4-HMAC-SHA256 Credential=ship"), "InvalidRequest"),
        (lambda: altered(headers=[], query=b"AWSAccessKeyId=ship&Signature=x&Expires=1"), "InvalidRequest"),
        (lambda: altered(headers=[], query=b"X-Amz-Signature=%ff"), "AuthorizationQueryParametersError"),
    ],
)
def test_what_was_altered_or_signed_by_somebody_else_is_not(signed: Callable[[], Request], code: str) -> None:
    # Signed now: a suite takes longer than the quarter of an hour that a signature is good for.
    assert refused(signed()) == code


def test_a_request_is_good_for_a_quarter_of_an_hour_in_both_directions() -> None:
    request = sent(by_header())
    for minutes in (-14, 14):
        check(request, KEY, SECRET, datetime.now(UTC) + timedelta(minutes=minutes))
    for minutes in (-16, 16):
        assert refused(request, later=timedelta(minutes=minutes)) == "RequestTimeTooSkewed"


def test_an_address_is_good_for_a_week_at_most_and_not_before_its_time() -> None:
    assert refused(sent(by_address(604_801))) == "AuthorizationQueryParametersError"
    assert refused(sent(by_address(60)), later=timedelta(minutes=-16)) == "RequestTimeTooSkewed"


def test_a_header_that_stands_twice_is_refused() -> None:
    request = sent(by_header())
    twice = [*request.headers, *(item for item in request.headers if item[0] == b"authorization")]
    assert refused(altered(headers=twice)) == "InvalidRequest"
