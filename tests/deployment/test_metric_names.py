"""What the dashboard and the autoscaler ask for is what the server exports."""

import json
import re

import pytest

from mili.async_llm import AsyncLLM
from mili.server.app import create_app
from mili.server.config import ServerConfig
from mili.server.metrics import StepTotals
from support.deployment import DASHBOARD, KUBERNETES, documents

METRIC = re.compile(r"mili:\w+")
PARTS = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
PANELS = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]


@pytest.fixture(scope="module")
def exported():
    """Series name to its kind, of a server with the bundled model."""
    steps = StepTotals()
    llm = AsyncLLM(on_step=steps.add, kv_cache_memory_bytes=64 << 20)
    try:
        registry = create_app(llm, ServerConfig(), steps).state.operation.metrics.registry
        families = list(registry.collect())
    finally:
        llm.close()
    return {family.name + part: family.type for family in families for part in PARTS[family.type]}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_shows_what_there_is(panel, exported):
    for target in panel["targets"]:
        names = METRIC.findall(target["expr"])
        assert names
        for name in names:
            assert name in exported, name
            rated = re.search(rf"rate\({name}\b", target["expr"]) is not None
            assert rated == (exported[name] != "gauge"), f"{name} is a {exported[name]}"


def test_the_dashboard_shows_what_an_operator_asks_first(exported):
    shown = set(METRIC.findall(json.dumps(PANELS)))
    stems = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_ready")
    assert {f"mili:{stem}" for stem in stems} <= shown
    counters = {name for name, kind in exported.items() if kind == "counter" and name.startswith("mili:")}
    assert counters <= shown, "a counter nobody looks at"


def test_the_dashboards_variable_is_a_label_of_a_metric(exported):
    (variable,) = json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]).groups()
    assert metric in exported
    assert label == variable["name"] == "model_name"


def test_the_autoscalers_metrics_come_from_exported_ones(exported):
    component = KUBERNETES / "components" / "prometheus"
    (autoscaler,) = documents(component / "hpa.yaml")
    (values,) = documents(component / "prometheus-adapter.yaml")
    (rule,) = values["rules"]["custom"]
    series = re.match(r'\{__name__=~"([^"]*)"', rule["seriesQuery"])[1]
    renamed = set()
    for name in exported:
        if re.fullmatch(series, name):
            assert exported[name] == "gauge"
            renamed.add(re.sub(rule["name"]["matches"], rule["name"]["as"].replace("$1", r"\1"), name))
    asked = {metric["pods"]["metric"]["name"] for metric in autoscaler["spec"]["metrics"]}
    assert asked == renamed
