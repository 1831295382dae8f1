"""A schema fuzzer over the OpenAPI document: every answer of the server is one that the document names."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from moe_ray.serve_config import ServeConfig
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder

CHECKS: list[Any] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
OPERATIONS = 9


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    model = load_chat_model(write_chat_folder(tmp_path_factory.mktemp("hf") / NAME))
    with served(model, ServeConfig(max_context=64, max_batch_size=8, max_queued_requests=130)) as url:
        yield url


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_as_documented(url, mode):
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == OPERATIONS
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            # Else nearly all would ask for models that do not exist.
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = NAME
            case.call_and_validate(checks=CHECKS)

        check()
