"""What the OpenAPI document says is what the frontend does: schemathesis drives each operation from it."""

from __future__ import annotations

import asyncio

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.integration.frontend.conftest import MODEL, Site

CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance)
EXAMPLES = 15


async def test_no_operation_breaks(site: Site) -> None:
    site.answer("fine")
    seen = await asyncio.to_thread(drive, site.url)
    operations = {operation for operation, _ in seen}
    assert {"POST /v1/chat/completions", "POST /v1/responses", "POST /detokenize", "GET /v1/models"} <= operations
    # Neither all refused nor all accepted: the requests were near the border.
    assert {("POST /tokenize", 200), ("POST /tokenize", 400), ("POST /v1/completions", 400)} <= seen
    await site.until(lambda: site.frontend.cluster.in_flight == 0)


def drive(url: str) -> set[tuple[str, int]]:
    """Which operation answered with which status."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=20)
    seen: set[tuple[str, int]] = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def one(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and len(str(case.body.get("model"))) % 2 == 0:
                case.body["model"] = MODEL
            response = case.call(timeout=20)
            case.validate_response(response, checks=list(CHECKS))
            seen.add((case.operation.label, response.status_code))

        one()
    return seen
