"""The OpenAPI says what the server does: schemathesis asks what fits the schema, and what does not."""

import base64

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from pnc.serving.limits import Limits
from running_server import TOKEN, deployment, image_bytes, running

load_all_checks()
NOT_IN_A_SCHEMA = [positive_data_acceptance]
"""Bytes that are not an image, or not a clone file, fit the schema and are refused."""

for kind, suffix in (("image/png", "PNG"), ("image/jpeg", "JPEG"), ("application/octet-stream", "BMP")):
    schemathesis.openapi.media_type(kind, st.sampled_from(image_bytes(3, kind=suffix)) | st.binary(max_size=200))
schemathesis.openapi.format("base64-image", st.sampled_from([base64.b64encode(one).decode() for one in image_bytes(3)]))


@pytest.fixture(scope="module")
def api():
    with running(deployment(None, "dog"), Limits(wait_ms=0)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


FAST = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def excluded(case):
    """The checks that do not hold for a request. A query has no types: an empty text is sent as a list of one."""
    is_a_list_as_sent = "clones" in (case.query or {}) and case.query["clones"] in ("", None, [""], [None])
    return [*NOT_IN_A_SCHEMA, negative_data_rejection] if is_a_list_as_sent else NOT_IN_A_SCHEMA


def ask(api, kind: settings) -> int:
    """Ask every operation what fits its schema, and what does not if it takes anything."""
    count = 0
    for found in api.get_all_operations():
        operation = found.ok()
        takes = bool(list(operation.iter_parameters())) or bool(operation.body)
        for mode in [GenerationMode.POSITIVE, GenerationMode.NEGATIVE][: 1 + takes]:

            @settings(kind)
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case):
                nonlocal count
                count += 1
                case.call_and_validate(headers=HEADERS, excluded_checks=excluded(case), timeout=10)

            one()
    return count


def test_requests_get_what_the_openapi_says(api):
    assert ask(api, FAST) > 40


@pytest.mark.slow
def test_many_requests_get_what_the_openapi_says(api):
    assert ask(api, settings(FAST, max_examples=1000)) > 1000
