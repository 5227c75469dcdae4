"""What the OpenAPI document promises: whatever is sent, nothing but the documented comes back, and never a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance  # a schema cannot say all that is refused

from mili import AsyncLLM
from mili.server.app import create_app
from mili.server.config import ServerConfig
from support import fake_llm


@pytest.fixture(scope="module")
def document():
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_llm.install(monkeypatch)
        llm = AsyncLLM(max_model_len=64)
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(llm, ServerConfig(access_log=False)))
        llm.close()


def test_whatever_is_sent_the_document_holds(document):
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
