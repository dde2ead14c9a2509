"""The manifests for Kubernetes: well-formed, closed to strangers, and of one piece."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hvp_service.app.config import ServerConfig

from tests.deploy.settings import server_config

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = ROOT / "deploy" / "kubernetes"
BIN = Path(sys.executable).parent
Object = dict[str, Any]
#: What an operator, or KubeRay, makes beside the manifests.
SECRETS = {"hvp-tls": {"tls.crt", "tls.key"}, "hvp-ray": {"auth_token"}}
#: How much longer than its grace a server may take to end its ranks and to close.
LATEST_S = 20


# With figures where the server has them.
OVERLAYS = ["base", "gpu", *(["metrics"] if "metrics_address" in ServerConfig.model_fields else [])]


@pytest.fixture(scope="module", name="objects", params=OVERLAYS)
def _objects(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Object]:
    folder = MANIFESTS / request.param
    if request.param == "metrics":
        overlay = tmp_path_factory.mktemp("overlay").resolve()
        lines = {
            "resources": [os.path.relpath(MANIFESTS / "gpu", overlay)],
            "components": [os.path.relpath(folder, overlay)],
        }
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(lines))
        folder = overlay
    answer = subprocess.run(
        [BIN / "kubectl", "kustomize", folder], check=True, capture_output=True, text=True
    )
    return list(yaml.safe_load_all(answer.stdout))


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def pods(objects: list[Object]) -> dict[str, Object]:
    """Templates of all pods by name, with the labels that their makers add."""
    found = {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in of_kind(objects, "Deployment")
    }
    for cluster in of_kind(objects, "RayCluster"):
        name = cluster["metadata"]["name"]
        groups = {"head": cluster["spec"]["headGroupSpec"]}
        groups |= {each["groupName"]: each for each in cluster["spec"]["workerGroupSpecs"]}
        for group, spec in groups.items():
            template = spec["template"]
            labels = template["metadata"]["labels"] | {"ray.io/cluster": name}
            found[f"{name}-{group}"] = template | {"metadata": {"labels": labels}}
    return found


def server(objects: list[Object]) -> tuple[Object, Object, dict[str, Any]]:
    """The server's deployment, its container, and the container's variables."""
    [deployment] = of_kind(objects, "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return deployment, container, {each["name"]: each for each in container["env"]}


def cluster_of(objects: list[Object]) -> Object:
    [cluster] = of_kind(objects, "RayCluster")
    return cluster


def test_every_yaml_file_passes_the_linter() -> None:
    answer = subprocess.run(
        [BIN / "yamllint", "--strict", "deploy", ".yamllint"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout


def test_every_object_has_the_schema_of_its_kind(objects: list[Object]) -> None:
    checked = 0
    for each in objects:
        if each["kind"] == "RayCluster":
            continue
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        checked += 1
    assert checked >= 8
    # Of KubeRay's resource there is no schema here; the pods in it are pods.
    for name, template in pods(objects).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": name, **template["metadata"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_an_object_that_is_none_is_found(objects: list[Object]) -> None:
    """The check above can fail."""
    deployment, _, _ = server(objects)
    for broken in (
        deployment | {"spec": deployment["spec"] | {"replica": 1}},
        deployment | {"spec": deployment["spec"] | {"replicas": "one"}},
    ):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_the_cluster_is_one_that_kuberay_and_this_ray_can_start(objects: list[Object]) -> None:
    from ray.scripts.scripts import start

    cluster = cluster_of(objects)
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    assert spec["rayVersion"] == pinned["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, pinned["ray"].split("."))) >= (2, 53)  # tokens, and health without
    options = {option.removeprefix("--") for each in start.params for option in each.opts}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        parameters = group["rayStartParams"]
        assert parameters.keys() <= options
        assert all(isinstance(value, str) for value in parameters.values())
    head = spec["headGroupSpec"]["rayStartParams"]
    assert (head["num-cpus"], head["num-gpus"]) == ("0", "0")
    for group in spec["workerGroupSpecs"]:
        assert re.fullmatch(r"[a-z][a-z0-9-]*", group["groupName"])
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        assert "include-dashboard" not in group["rayStartParams"]  # of heads alone


def test_there_is_a_place_for_each_rank_and_none_on_head_or_server(objects: list[Object]) -> None:
    _, container, variables = server(objects)
    config = server_config(container["args"], plain(variables))
    places = {"num-cpus": 0, "num-gpus": 0}
    for group in cluster_of(objects)["spec"]["workerGroupSpecs"]:
        for kind in places:
            places[kind] += group["replicas"] * int(group["rayStartParams"][kind])
        [ray] = group["template"]["spec"]["containers"]
        gpus = ray["resources"].get("limits", {}).get("nvidia.com/gpu", "0")
        assert gpus == group["rayStartParams"]["num-gpus"]
        threads = {each["name"]: each["value"] for each in ray["env"]}["OMP_NUM_THREADS"]
        cores = int(ray["resources"]["requests"]["cpu"])
        assert int(threads) * int(group["rayStartParams"]["num-cpus"]) <= cores
    assert config.workers == places["num-cpus"]
    assert places["num-gpus"] == (config.workers if config.device == "cuda" else 0)


def plain(variables: dict[str, Any]) -> dict[str, str]:
    return {name: each["value"] for name, each in variables.items() if "value" in each}


def test_the_server_is_a_node_of_the_cluster_with_its_token(objects: list[Object]) -> None:
    deployment, container, variables = server(objects)
    cluster = cluster_of(objects)["metadata"]["name"]
    assert variables["RAY_ADDRESS"]["value"] == f"{cluster}-head-svc:6379"
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == cluster
    assert variables["NODE_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    # The images' program starts the node; nothing takes its place.
    assert "command" not in container
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert deployment["spec"]["replicas"] == 1


def test_the_server_ends_within_the_time_that_its_pod_has(objects: list[Object]) -> None:
    deployment, container, variables = server(objects)
    config = server_config(container["args"], plain(variables))
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= config.grace_s + LATEST_S
    assert config.credentials_required
    port = config.address.rpartition(":")[2]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports.pop("grpc") == int(port)
    assert ports.keys() <= {"metrics"}
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"][:3] == ["python", "-m", "hvp_service.app.probe"]
    # Ranks that start anew are no reason to end the server; that it answers is enough.
    assert container["livenessProbe"]["exec"]["command"][3:] == ["--alive"]


def test_every_container_is_confined(objects: list[Object]) -> None:
    [namespace] = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in pods(objects).values():
        pod = template["spec"]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False
            assert inner["readOnlyRootFilesystem"] is True
            assert inner["capabilities"] == {"drop": ["ALL"]}
            assert not inner.get("privileged")
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert container["resources"]["limits"]["memory"]
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            assert not container["image"].endswith(":latest")
            # What is written to in a read-only file system.
            mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
            volumes = {each["name"]: each for each in pod["volumes"]}
            assert set(mounts.values()) == volumes.keys()
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"  # noqa: S108
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]  # noqa: S108
            assert "emptyDir" in volumes[mounts["/tmp"]]  # noqa: S108


def test_ranks_and_server_have_the_state_under_one_path_as_one_user(objects: list[Object]) -> None:
    [claim] = of_kind(objects, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    _, container, variables = server(objects)
    config = server_config(container["args"], plain(variables))
    for template in pods(objects).values():
        [inner] = template["spec"]["containers"]
        volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        [path] = [
            Path(each["mountPath"])
            for each in inner["volumeMounts"]
            if "persistentVolumeClaim" in volumes[each["name"]]
        ]
        # Below it: the volume's own folder belongs to root, which a server refuses.
        assert path in config.state_dir.parents
        assert volumes["state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_no_secret_is_written_down_and_each_that_is_named_is_known(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret")
    named = list(secrets(objects))
    assert {name for name, _ in named} == SECRETS.keys()
    for name, key in named:
        assert key is None or key in SECRETS[name]
    _, container, variables = server(objects)
    config = server_config(container["args"], plain(variables))
    mounted = {each["mountPath"]: each for each in container["volumeMounts"]}
    for path in (config.tls_certificate, config.tls_key):
        # By subPath: a certificate that is renewed does not part the probes from the server.
        assert mounted[str(path)]["subPath"] in SECRETS["hvp-tls"]


def secrets(node: Any) -> Iterator[tuple[str, str | None]]:
    """Names of secrets, and keys in them, anywhere in objects."""
    if isinstance(node, dict):
        if "secretName" in node:
            yield node["secretName"], None
        if "secretKeyRef" in node:
            yield node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from secrets(each)


def selects(selector: Object, labels: Object) -> bool:
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def test_rays_ports_are_open_to_nodes_of_the_cluster_alone(objects: list[Object]) -> None:
    policies = of_kind(objects, "NetworkPolicy")
    closed = [each for each in policies if each["metadata"]["name"] == "deny-all"]
    assert [each["spec"]["podSelector"] for each in closed] == [{}]
    assert closed[0]["spec"].keys() == {"podSelector", "policyTypes"}
    assert set(closed[0]["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    node = {"hvp/ray": "node"}
    for name, template in pods(objects).items():
        labels = template["metadata"]["labels"]
        assert node.items() <= labels.items()  # the server is one too
        rules = [
            rule
            for policy in policies
            if selects(policy["spec"]["podSelector"], labels)
            for rule in policy["spec"].get("ingress", [])
        ]
        inside = {"from": [{"podSelector": {"matchLabels": node}}]}
        others = [rule for rule in rules if rule != inside]
        assert len(others) == len(rules) - 1
        assert bool(others) == (name == "hvp-server")
        for rule in others:  # strangers reach the server, and Prometheus its figures
            assert [each["port"] for each in rule["ports"]] in (["grpc"], ["metrics"])
            [peer] = rule["from"]
            assert peer["namespaceSelector"]["matchLabels"]
    outside = [
        rule
        for policy in policies
        for rule in policy["spec"].get("egress", [])
        if any("podSelector" not in peer or "namespaceSelector" in peer for peer in rule["to"])
    ]
    assert [[each["port"] for each in rule["ports"]] for rule in outside] == [[53, 53]]


def test_services_and_budgets_select_the_pods_that_they_are_for(objects: list[Object]) -> None:
    labels = {name: each["metadata"]["labels"] for name, each in pods(objects).items()}
    [service] = of_kind(objects, "Service")
    selected = {
        name for name, each in labels.items() if service["spec"]["selector"].items() <= each.items()
    }
    assert selected == {"hvp-server"}
    groups = cluster_of(objects)["spec"]["workerGroupSpecs"]
    for budget in of_kind(objects, "PodDisruptionBudget"):
        chosen = {
            name for name, each in labels.items() if selects(budget["spec"]["selector"], each)
        }
        if chosen == {"hvp-server"}:
            assert budget["spec"]["maxUnavailable"] == 0
        else:
            assert chosen == labels.keys() - {"hvp-server"}
            assert budget["spec"]["minAvailable"] == 1 + sum(each["replicas"] for each in groups)


def test_images_are_those_that_are_built_here(objects: list[Object]) -> None:
    bake = json.loads((ROOT / "deploy" / "docker" / "docker-bake.json").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {
        container["image"]
        for template in pods(objects).values()
        for container in template["spec"]["containers"]
    }
    assert images <= {f"hvp/{name}:{version}" for name in bake["target"]}
