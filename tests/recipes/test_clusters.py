"""The files for clusters, checked as far as one machine can."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_easyscale.elastic.control import FOLDER_VARIABLE
from lightning_easyscale.topology import NUM_ESTS_VARIABLE
from tests.launch.test_launch import ROOT, environment

CLUSTERS = ROOT / "recipes" / "clusters"


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return {document["kind"]: document for document in yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())}


def test_the_manifests_have_what_kubernetes_requires(manifests: dict[str, Any]) -> None:
    assert list(manifests) == ["PersistentVolumeClaim", "TrainingRuntime", "TrainJob"]
    assert all(re.fullmatch(r"[a-z0-9-]+", m["metadata"]["name"]) for m in manifests.values())
    trainer = {manifests[kind]["apiVersion"] for kind in ("TrainingRuntime", "TrainJob")}
    assert trainer == {"trainer.kubeflow.org/v1alpha1"}
    job, runtime = manifests["TrainJob"]["spec"], manifests["TrainingRuntime"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["runtimeRef"]["kind"] == runtime["kind"]
    assert "torch" in runtime["spec"]["mlPolicy"]


def test_the_manifests_have_no_field_that_the_api_does_not_know(manifests: dict[str, Any]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    classes = {
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    for kind, manifest in manifests.items():
        known = classes[kind].from_dict(manifest)  # a wrong type or a missing field is an error
        assert known.to_dict() == manifest, f"{kind}: the API drops what it does not know"


def test_the_manifests_give_the_job_its_number_of_ests_and_a_shared_folder(manifests: dict[str, Any]) -> None:
    (node,) = manifests["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in variables.values()), "Kubernetes takes strings only"
    assert 1 <= manifests["TrainJob"]["spec"]["trainer"]["numNodes"] <= int(variables[NUM_ESTS_VARIABLE])
    (mount,) = container["volumeMounts"]
    assert Path(mount["mountPath"]) in Path(variables[FOLDER_VARIABLE]).parents
    (volume,) = pod["volumes"]
    claim = manifests["PersistentVolumeClaim"]
    assert (volume["name"], volume["persistentVolumeClaim"]["claimName"]) == (mount["name"], claim["metadata"]["name"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "pods of several nodes write to it"
    assert pod["terminationGracePeriodSeconds"] > 30, "torchrun gives its workers 30 s"


def test_the_slurm_script_asks_for_what_lightning_needs_to_requeue() -> None:
    text = (CLUSTERS / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert {"requeue", "nodes", "ntasks-per-node", "signal"} <= set(options)
    assert options["signal"].startswith("SIGUSR1@"), "the signal that Lightning's environment requeues on"
    assert f"export {FOLDER_VARIABLE}=" in text
    shell = shutil.which("bash")
    assert shell is None or subprocess.run([shell, "-n", str(CLUSTERS / "slurm.sh")]).returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.timeout(300)
def test_ray_workers_do_not_change_the_result(tmp_path: Path) -> None:
    trained = []
    for workers in ("1", "2"):
        command = [sys.executable, str(CLUSTERS / "ray_train.py"), "--workers", workers, "--dir"]
        done = subprocess.run(
            [*command, str(tmp_path / workers)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        trained.append(torch.load(tmp_path / workers / "trained.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
