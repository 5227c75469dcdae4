"""The manifests: valid for Kubernetes, consistent with each other, with the image and with the server."""

import copy
import re
import shutil

import pytest
import yaml

from support.deployment import DOCKER, KUBERNETES, documents, option, parse_serve, rendered, stages

OVERLAYS = ["cpu", "nvidia"]
OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes: the preStop sleep came with 1.30
PLAIN = [*KUBERNETES.glob("base/*.yaml"), KUBERNETES / "components/prometheus/hpa.yaml"]
PLAIN += KUBERNETES.glob("components/shared-cache/pvc.yaml")
IMAGE = stages(DOCKER / "Dockerfile")["cpu"]


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request):
    return rendered(KUBERNETES / "overlays" / request.param)


@pytest.fixture
def pod(manifests):
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


def validate(manifest, version):
    """Raise unless the manifest has only fields that this version of Kubernetes knows, of the right types."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    if manifest["kind"] == "ServiceMonitor":  # the Prometheus Operator's own kind
        assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
        assert manifest["spec"].keys() == {"selector", "endpoints"}
        assert all(endpoint.keys() == {"port", "path", "interval"} for endpoint in manifest["spec"]["endpoints"])
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_takes_an_overlay(manifests, version):
    assert manifests.keys() == {
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service", "ServiceMonitor")
    }
    for manifest in manifests.values():
        validate(manifest, version)


@pytest.mark.parametrize("path", [path for path in PLAIN if path.name != "kustomization.yaml"], ids=lambda p: p.name)
def test_kubernetes_takes_the_files_as_they_are(path):
    for manifest in documents(path):
        validate(manifest, OLDEST)


@pytest.mark.parametrize(("where", "value"), [("gone", 1), ("terminationGracePeriodSeconds", "long")])
def test_a_wrong_field_is_noticed(where, value):
    (deployment,) = documents(KUBERNETES / "base" / "deployment.yaml")
    broken = copy.deepcopy(deployment)
    broken["spec"]["template"]["spec"][where] = value
    validate(deployment, OLDEST)
    with pytest.raises(Exception, match=f"{where}|'long'"):
        validate(broken, OLDEST)


def test_selectors_select_the_pods(manifests):
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == manifests["Service"]["metadata"]["labels"]
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])
    assert "replicas" not in manifests["Deployment"]["spec"], "the autoscaler's number would be reset by every apply"


def test_ports_are_the_images(manifests, container):
    (port,) = container["ports"]
    assert [str(port["containerPort"])] == IMAGE["EXPOSE"]
    (service_port,) = manifests["Service"]["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    assert manifests["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == service_port["name"]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")} == {"http"}


def test_probes_ask_what_they_should(container):
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 10 * 60, "a download and a compilation"


def test_there_is_time_to_drain(pod, container):
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(option(container["args"], "drain-timeout"))
    assert pod["terminationGracePeriodSeconds"] >= sleep + drain + 15


def test_the_pod_meets_the_restricted_profile(pod, container):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert [user] == IMAGE["USER"]


def test_everything_that_is_written_is_mounted(pod, container):
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {*IMAGE["VOLUME"], "/tmp"}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


def test_the_command_is_one_that_mili_takes(manifests, container):
    values = manifests["ConfigMap"]["data"]
    assert container["envFrom"] == [{"configMapRef": {"name": manifests["ConfigMap"]["metadata"]["name"]}}]
    words = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container["args"]]
    assert values.keys() == set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))), "set and not used"
    assert parse_serve(words)["model"] == values["MILI_MODEL"]


def test_no_key_is_in_the_tree(container):
    for path in KUBERNETES.rglob("*.yaml"):
        assert not [doc for doc in documents(path) if doc.get("kind") == "Secret"], path
    (key,) = container["env"]
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True
    assert "value" not in key


def test_the_gpu_overlay_asks_for_a_gpu():
    pod = rendered(KUBERNETES / "overlays" / "nvidia")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert option(container["args"], "device") == "gpu"
    assert container["image"] == "mili:nvidia"


def test_the_cpu_overlay_has_its_cores_to_itself():
    (container,) = rendered(KUBERNETES / "overlays" / "cpu")["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["requests"]["cpu"].isdecimal()


def test_running_requests_scale_before_the_batch_is_full(manifests):
    metrics = {m["pods"]["metric"]["name"]: m["pods"] for m in manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    running = int(metrics["mili_num_requests_running"]["target"]["averageValue"])
    assert running == 0.75 * int(manifests["ConfigMap"]["data"]["MILI_MAX_NUM_SEQS"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cache_can_be_shared(overlay, tmp_path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    path = tmp_path / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
    line = "  # - ../../components/shared-cache\n"
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1
    path.write_text(text.replace(line, line.replace("# ", "")), encoding="utf-8")
    manifests = rendered(path.parent)
    claim = manifests["PersistentVolumeClaim"]["metadata"]["name"]
    volumes = manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert volumes[0] == {"name": "cache", "persistentVolumeClaim": {"claimName": claim}}
    assert [volume["name"] for volume in volumes] == ["cache", "tmp"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_monitoring_component_can_be_left_out(overlay, tmp_path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    path = tmp_path / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text(encoding="utf-8"))
    del kustomization["components"]
    path.write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    assert rendered(path.parent).keys() == {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}
