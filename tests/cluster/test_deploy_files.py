"""The files for clusters that no test can rent are parsed, checked and, where they contain shell commands, run.

`ray up` itself validates with `validate_config(prepare_config(...))`; the GCP and on-premise variants are
made by the very `sed` lines that cluster.yaml prints, and the start commands run against a stand-in `ray`
that shows its arguments and environment. The fields of a RayJob are those of KubeRay 1.6's `ray.io/v1`.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.local.config import LOCAL_CLUSTER_NODE_TYPE
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs

from pipeline import VERSION
from tests.support.project import ROOT

SHIPPED = [
    "cluster.yaml", "deploy/kuberay-rayjob.yaml", "deploy/networkpolicy.yaml", "deploy/Dockerfile", "deploy/README.md",
]  # fmt: skip
PROVIDERS = ["aws", "gcp", "local"]
MOUNT = "/mnt/swsc"


@cache
def text_of(provider: str) -> str:
    """cluster.yaml as it stands (aws), or after the `sed` line in its own header."""
    text = (ROOT / "cluster.yaml").read_text()
    if provider == "aws":
        return text
    (line,) = re.findall(rf"^#\s+(sed .*) > cluster-{provider}\.yaml$", text, flags=re.MULTILINE)
    return subprocess.run(shlex.split(line), cwd=ROOT, check=True, capture_output=True, text=True).stdout


def cluster(provider: str) -> dict[str, Any]:
    """What `ray up` makes of the file: Ray's defaults filled in, one list of setup commands a node kind."""
    return prepare_config(yaml.safe_load(text_of(provider)))


def started_by(provider: str, kind: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of `ray start` when `ray up` runs the command of a "head" or a "worker"."""
    config = cluster(provider)
    (command,) = (c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c)
    # As `ray up` does it: exports in front of the command, inside a shell that has OMP_NUM_THREADS=1.
    node_type = config["head_node_type"] if kind == "head" else "gpu"
    exported: Any = with_envs([command], {"RAY_enable_autoscaler_v2": "1", "RAY_NODE_TYPE_NAME": node_type})
    (command,) = exported  # a list, although Ray declares a string
    ray = folder / "ray"
    ray.write_text("#!/bin/sh\nprintf 'ARG %s\\n' \"$@\"\nenv\n")
    ray.chmod(0o755)
    shell = {"PATH": f"{folder}:{os.defpath}", "OMP_NUM_THREADS": "1", "RAY_HEAD_IP": "10.0.0.1"}
    shown = subprocess.run(["bash", "-c", command], env=shell, check=True, capture_output=True, text=True)
    lines = shown.stdout.splitlines()
    arguments = [line.removeprefix("ARG ") for line in lines if line.startswith("ARG ")]
    return arguments, dict(line.split("=", 1) for line in lines if not line.startswith("ARG "))


def found(pattern: str, name: str) -> list[str]:
    return re.findall(pattern, (ROOT / name).read_text(), flags=re.MULTILINE)


def ray_pin() -> str:
    (pin,) = found(r"^ray(?:\[\S*\])?==(\S+)", "constraints.txt")
    return pin


# ---- cluster.yaml: `ray up` on AWS, GCP, machines of one's own


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_up_accepts_every_provider_of_cluster_yaml(provider: str) -> None:
    config = cluster(provider)
    validate_config(config)
    assert config["provider"]["type"] == provider


@pytest.mark.parametrize("provider", ["gcp", "local"])
def test_a_variant_differs_from_aws_only_where_the_provider_does(provider: str) -> None:
    own = {"provider", "auth", "available_node_types", "head_node_type", "max_workers", "head_setup_commands"}
    aws, other = yaml.safe_load(text_of("aws")), yaml.safe_load(text_of(provider))
    assert {k: v for k, v in aws.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    assert aws["provider"].keys() & other["provider"].keys() <= {"type", "region", "availability_zone"}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_head_offers_no_cpu_and_no_gpu(provider: str, tmp_path: Path) -> None:
    arguments, _ = started_by(provider, "head", tmp_path)
    assert {"start", "--head", "--num-cpus=0", "--num-gpus=0"} <= set(arguments)
    if provider != "local":  # there the provider's own count of the machine would override the flags
        config = cluster(provider)
        resources = config["available_node_types"][config["head_node_type"]]["resources"]
        assert (resources["CPU"], resources["GPU"]) == (0, 0)


@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_node_starts_with_token_auth_and_with_its_threads(provider: str, kind: str, tmp_path: Path) -> None:
    _, environment = started_by(provider, kind, tmp_path)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "OMP_NUM_THREADS" not in environment


@pytest.mark.parametrize("provider", PROVIDERS)
def test_shells_opened_later_use_token_auth_and_find_the_token(provider: str) -> None:
    config = cluster(provider)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_dashboard_listens_on_the_loopback_only(provider: str, tmp_path: Path) -> None:
    arguments, _ = started_by(provider, "head", tmp_path)
    assert [a for a in arguments if a.startswith("--dashboard-host")] == ["--dashboard-host=127.0.0.1"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_worker_joins_the_head_on_the_port_where_it_listens(provider: str, tmp_path: Path) -> None:
    head, _ = started_by(provider, "head", tmp_path)
    worker, _ = started_by(provider, "worker", tmp_path)
    (port,) = (a.removeprefix("--port=") for a in head if a.startswith("--port="))
    assert f"--address=10.0.0.1:{port}" in worker


@pytest.mark.parametrize(("provider", "v2"), [("aws", "1"), ("gcp", "1"), ("local", "0")])
def test_autoscaler_v2_is_off_on_premise_only(provider: str, v2: str, tmp_path: Path) -> None:
    arguments, environment = started_by(provider, "head", tmp_path)
    assert environment["RAY_enable_autoscaler_v2"] == v2
    assert any(a.startswith("--autoscaling-config=") for a in arguments)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gpu_nodes_come_when_a_run_asks_and_idle_out(provider: str) -> None:
    config = cluster(provider)
    workers = config["available_node_types"][LOCAL_CLUSTER_NODE_TYPE if provider == "local" else "gpu"]
    assert 1 <= workers["max_workers"] <= config["max_workers"]
    assert workers["min_workers"] == (workers["max_workers"] if provider == "local" else 0)
    assert 0 < config["idle_timeout_minutes"] <= 15
    for command in shown_commands("cluster.yaml"):
        assert {"--elastic", "--gpus-per-worker", "--workers"} <= set(command)
    assert "--gpus all" in config["docker"]["worker_run_options"]
    if provider == "gcp":  # the one provider where Ray would not detect it
        assert workers["resources"]["GPU"] >= 1


def test_workers_have_rights_to_an_object_store_and_the_head_keeps_those_that_ray_gives_it() -> None:
    aws, gcp = (cluster(provider)["available_node_types"] for provider in ("aws", "gcp"))
    assert aws["gpu"]["node_config"]["IamInstanceProfile"]["Name"]
    assert "IamInstanceProfile" not in aws["head"]["node_config"]
    (account,) = gcp["gpu"]["node_config"]["serviceAccounts"]
    assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
    assert "serviceAccounts" not in gcp["head"]["node_config"]


def test_disks_are_encrypted_and_the_head_is_bought_on_demand() -> None:
    for node in cluster("aws")["available_node_types"].values():  # GCP encrypts every disk
        assert all(disk["Ebs"]["Encrypted"] is True for disk in node["node_config"]["BlockDeviceMappings"])
    assert "InstanceMarketOptions" not in cluster("aws")["available_node_types"]["head"]["node_config"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_network_filesystem_waits_for_its_server(provider: str) -> None:
    (command,) = (c for c in cluster(provider)["initialization_commands"] if "mount -t nfs" in c)
    (options,) = re.findall(r"mount -t nfs -o (\S+) ", command)
    assert {"nfsvers=4.1", "noresvport", "hard"} <= set(options.split(","))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_node_installs_dependencies_only_where_its_image_has_none(provider: str, kind: str, tmp_path: Path) -> None:
    config = cluster(provider)
    (target,) = (remote for remote, local in config["file_mounts"].items() if local == ".")
    (command,) = (c for c in config[f"{kind}_setup_commands"] if "constraints.txt" in c)
    command = command.replace(target, str(tmp_path / "checkout")).replace("/tmp/src", str(tmp_path / "src"))
    (tmp_path / "checkout").mkdir()
    for there, expected in ((True, ""), (False, "install -c constraints.txt .\n")):
        (tmp_path / "python").write_text(f"#!/bin/sh\nexit {int(not there)}\n")
        (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
        for name in ("python", "pip"):
            (tmp_path / name).chmod(0o755)
        shell = {"PATH": f"{tmp_path}:{os.defpath}"}
        done = subprocess.run(["bash", "-c", command], env=shell, check=True, capture_output=True, text=True)
        assert done.stdout == expected


@pytest.mark.parametrize("unshipped", [".git", ".venv", "outputs", ".safetensors"])
def test_the_sync_leaves_behind(unshipped: str) -> None:
    assert any(unshipped in pattern for pattern in cluster("aws")["rsync_exclude"])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_containers_see_the_filesystem_that_their_host_must_mount(provider: str) -> None:
    config = cluster(provider)
    assert any(f"mountpoint -q {MOUNT} ||" in command for command in config["initialization_commands"])
    assert f"-v {MOUNT}:{MOUNT}" in config["docker"]["run_options"]


# ---- versions: one Ray, one image, one Python


def test_the_image_is_built_on_the_pinned_ray_and_tagged_by_our_version(rayjob: dict[str, Any]) -> None:
    (base,) = found(r"^FROM (\S+)$", "deploy/Dockerfile")
    assert base.startswith(f"rayproject/ray:{ray_pin()}-py")
    built = {
        tag for name in ("deploy/Dockerfile", "deploy/README.md") for tag in found(r"-t REGISTRY/swsc:(\S+)", name)
    }
    used = {image.partition("swsc:")[2] for image in (cluster("aws")["docker"]["image"], *images_of(rayjob))}
    assert built == used == {VERSION}


def test_the_image_runs_as_a_user_that_is_a_number_and_not_root() -> None:
    (user,) = found(r"^USER (\S+)$", "deploy/Dockerfile")
    assert int(user) > 0


def test_the_constraints_leave_the_gpu_workers_a_torch_with_cuda() -> None:
    (pin,) = found(r"^torch==(\S+)", "constraints.txt")
    assert "+cpu" not in pin


def test_the_dockerfile_copies_only_what_is_there_and_all_that_is_installed() -> None:
    lines = found(r"^COPY (?:--\S+ )*(.+) \S+$", "deploy/Dockerfile")
    copied = {name for line in lines for name in line.split()}
    assert copied >= {"swsc_core", "pipeline", "jobs", "swsc_command.py", "pyproject.toml", "constraints.txt"}
    assert {name for name in copied if not (ROOT / name).exists()} == set()


# ---- the RayJob


def closed(required: str, optional: str = "", **of: dict[str, Any]) -> dict[str, Any]:
    """Schema of an object with these fields and no others: a misspelt one is an error, as in a cluster."""
    properties = {name: of.get(name, {}) for name in f"{required} {optional}".split()}
    return {"required": required.split(), "properties": properties, "additionalProperties": False}


def each(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


COUNT = {"type": "integer", "minimum": 1}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
SECURE_POD = closed(
    "runAsNonRoot runAsUser runAsGroup fsGroup seccompProfile",
    "fsGroupChangePolicy",
    runAsNonRoot={"const": True},
    runAsUser=COUNT,
    seccompProfile={"const": {"type": "RuntimeDefault"}},
)
SECURE_CONTAINER = closed(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    capabilities={"const": {"drop": ["ALL"]}},
)
SUBMITTER = closed(
    "restartPolicy automountServiceAccountToken securityContext containers",
    restartPolicy={"const": "Never"},
    securityContext=SECURE_POD,
    containers=each(
        closed("name image imagePullPolicy resources securityContext", "env", securityContext=SECURE_CONTAINER)
    ),
)
POD = closed(
    "containers volumes securityContext automountServiceAccountToken",
    "tolerations nodeSelector affinity serviceAccountName imagePullSecrets",
    securityContext=SECURE_POD,
    automountServiceAccountToken={"const": False},
    containers=each(
        closed(
            "name image imagePullPolicy resources volumeMounts securityContext envFrom",
            "ports env",
            securityContext=SECURE_CONTAINER,
            envFrom=each(closed("secretRef", secretRef=closed("name", "optional"))),
            resources=closed("limits requests"),
            volumeMounts=each(closed("name mountPath", "subPath readOnly")),
        )
    ),
    volumes=each(closed("name", "emptyDir persistentVolumeClaim secret configMap")),
)
LABELLED = closed("labels", labels=STRINGS)
GROUP = {"rayStartParams": STRINGS, "template": closed("spec metadata", metadata=LABELLED, spec=POD)}
RAY_CLUSTER = closed(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    "enableInTreeAutoscaling autoscalerOptions gcsFaultToleranceOptions headServiceAnnotations",
    authOptions=closed("mode", "secretName", mode={"const": "token"}),
    headGroupSpec=closed("template rayStartParams", "serviceType headService enableIngress", **GROUP),
    workerGroupSpecs=each(
        closed(
            "groupName replicas minReplicas maxReplicas template",
            "rayStartParams numOfHosts scaleStrategy idleTimeoutSeconds",
            **{"replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT, **GROUP},
        )
    ),
)
RAYJOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", "namespace labels annotations"),
    spec=closed(
        "entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished rayClusterSpec"
        " submitterPodTemplate",
        "activeDeadlineSeconds runtimeEnvYAML metadata suspend submitterConfig",
        submitterPodTemplate=closed("metadata spec", metadata=LABELLED, spec=SUBMITTER),
        submissionMode={"const": "K8sJobMode"},
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"const": True},
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


@pytest.fixture
def rayjob() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((ROOT / "deploy/kuberay-rayjob.yaml").read_text())
    return document


def groups(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    spec = rayjob["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def limits_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    return [container["resources"]["limits"] for container in group["template"]["spec"]["containers"]]


def test_the_rayjob_has_the_fields_kuberay_knows_retries_and_gives_its_gpus_back(rayjob: dict[str, Any]) -> None:
    jsonschema.validate(rayjob, RAYJOB)


def test_the_rayjob_names_the_pinned_ray(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray_pin()


def test_every_ray_container_has_shared_memory_and_the_models(rayjob: dict[str, Any]) -> None:
    for group in groups(rayjob):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            at = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert at["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            assert at[MOUNT]["persistentVolumeClaim"]["claimName"]


def templates(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    return [rayjob["spec"]["submitterPodTemplate"], *(group["template"] for group in groups(rayjob))]


def images_of(rayjob: dict[str, Any]) -> set[str]:
    return {c["image"] for template in templates(rayjob) for c in template["spec"]["containers"]}


def test_every_pod_of_the_rayjob_runs_one_image_and_asks_what_its_tag_means_now(rayjob: dict[str, Any]) -> None:
    assert len(images_of(rayjob)) == 1
    assert {c["imagePullPolicy"] for t in templates(rayjob) for c in t["spec"]["containers"]} == {"Always"}


def gib(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


def test_shared_memory_holds_rays_store_and_stays_below_the_memory_of_the_pod(rayjob: dict[str, Any]) -> None:
    for group in groups(rayjob):
        (shm,) = (v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")
        (limits,) = limits_of(group)
        assert 0.3 * gib(limits["memory"]) < gib(shm["sizeLimit"]) < gib(limits["memory"]) / 2


def test_the_head_stays_off_nodes_that_may_be_taken_away_and_workers_need_not(rayjob: dict[str, Any]) -> None:
    head, *workers = groups(rayjob)
    affinity = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    assert {one["operator"] for one in term["matchExpressions"]} == {"NotIn"}
    assert len(term["matchExpressions"]) >= 4
    assert all("affinity" not in group["template"]["spec"] for group in workers)


def test_the_pods_are_reached_by_each_other_and_by_the_operator_only(rayjob: dict[str, Any]) -> None:
    (policy,) = yaml.safe_load_all((ROOT / "deploy/networkpolicy.yaml").read_text())
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for template in templates(rayjob):
        assert labels.items() <= template["metadata"]["labels"].items()
    among, operator = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": labels}}]}
    (dashboard,) = operator["ports"]
    ports = [p for c in groups(rayjob)[0]["template"]["spec"]["containers"] for p in c["ports"]]
    assert dashboard["port"] in [p["containerPort"] for p in ports if p["name"] == "dashboard"]


def test_workers_of_the_rayjob_have_gpus_and_its_head_offers_nothing(rayjob: dict[str, Any]) -> None:
    head, *workers = groups(rayjob)
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert [limits.get("nvidia.com/gpu", 0) for limits in limits_of(head)] == [0]
    assert all(limits["nvidia.com/gpu"] >= 1 for group in workers for limits in limits_of(group))


# ---- the commands that all of them show


def shown_commands(*names: str) -> list[list[str]]:
    """Every `python -m jobs …` of the shipped files, as arguments."""
    texts = [re.sub(r" \\\n#? *", " ", (ROOT / name).read_text()) for name in names or SHIPPED]
    lines = [line for text in texts for line in re.findall(r"python -m jobs ([^`\n]+)", text)]
    return [shlex.split(line, comments=True) for line in lines]


def test_each_way_of_running_shows_a_command() -> None:
    assert len(shown_commands()) >= 2


@pytest.mark.parametrize("arguments", shown_commands(), ids=" ".join)
def test_a_shown_command_has_a_verb_and_flags_that_exist_and_paths_on_the_mount(arguments: list[str]) -> None:
    verb, flags = arguments[0], [a for a in arguments if a.startswith("--")]
    command = [sys.executable, "-m", "jobs", verb, "--help"]
    wide = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert [flag for flag in flags if flag not in shown.stdout] == []
    model, output = arguments[1:3]
    assert model.startswith(MOUNT + "/")
    assert output.startswith(MOUNT + "/")


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_of_a_private_index_is_shipped(name: str) -> None:
    assert found(r"index-url|find-links", name) == []
