"""The document at /openapi.json against the app: schemathesis makes requests from it and checks every answer by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.api.conftest import Client
from tests.api.scripted import MODEL

FEW = settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
# What a schema cannot say: text without NUL, a prompt that is not blank, a context that both fit in.
NO_NUL = schemathesis.Config.from_dict({"generation": {"allow-x00": False}})
BEYOND_SCHEMAS = [positive_data_acceptance]


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_as_documented(make_app: Callable[..., Flask], mode: GenerationMode) -> None:
    nobody = Client(make_app(user_rpm=1_000_000))
    wrong = mode is GenerationMode.NEGATIVE
    statuses: defaultdict[str, set[int]] = defaultdict(set)
    for found in schemathesis.openapi.from_wsgi("/openapi.json", nobody.app, config=NO_NUL).get_all_operations():
        operation = found.ok()
        if wrong and not (operation.body or operation.query):
            continue  # nothing to get wrong

        @FEW
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            if not wrong and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = MODEL  # or every answer were a 404
            token = {"Authorization": f"Bearer {nobody.login().token}"}
            answer = case.call_and_validate(headers=token, excluded_checks=BEYOND_SCHEMAS)
            statuses[case.operation.label].add(answer.status_code)

        ask()
    for path in ("/generate", "/stream", "/stream/ticket", "/v1/chat/completions"):
        assert statuses[f"POST {path}"] & {400, 422} if wrong else 200 in statuses[f"POST {path}"]
