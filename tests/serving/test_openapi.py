"""The OpenAPI says what the server does: schemathesis asks it with what fits the schema and with what does not."""

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pnc.serving.limits import Limits
from pnc.serving.web_app import Server, make_app
from running_server import TOKEN, deployment, image_bytes

APP = make_app(Server(deployment(None, "dog"), Limits(wait_ms=0), TOKEN))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
