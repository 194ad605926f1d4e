"""What machines say of their job: launchers' variables, TPU devices, and where process 0 is."""

import pytest

from selfreward_jax import cluster, processes
from selfreward_jax.errors import UserError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # a shell on one node of an allocation
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, False),
        ({}, False),
    ],
)
def test_who_starts_several(environment, expected):
    assert cluster.several(environment) is expected


GOOGLE, OTHER = "0x1ae0", "0x10de"
NETWORK, DISK, CHIP = "0x020000", "0x010802", "0xff0000"


@pytest.mark.parametrize(
    ("nodes", "devices", "expected"),
    [
        (["accel0", "accel1"], [], True),  # up to v5
        (["vfio/0", "vfio/vfio"], [(GOOGLE, CHIP)], True),  # v6e
        (
            ["vfio/0", "vfio/vfio"],
            [(GOOGLE, NETWORK), (GOOGLE, DISK), (OTHER, CHIP)],
            False,
        ),  # another device given whole
        (["vfio/vfio"], [(GOOGLE, CHIP)], False),  # the driver alone
        ([], [(GOOGLE, NETWORK)], False),
        (["accelerometer"], [], False),
        ([], [], False),
    ],
)
def test_which_hosts_have_a_tpu(tmp_path, nodes, devices, expected):
    dev, pci = tmp_path / "dev", tmp_path / "pci"
    for name in nodes:
        (dev / name).parent.mkdir(parents=True, exist_ok=True)
        (dev / name).touch()
    for number, (vendor, kind) in enumerate(devices):
        (pci / str(number)).mkdir(parents=True)
        (pci / str(number) / "vendor").write_text(f"{vendor}\n")
        (pci / str(number) / "class").write_text(f"{kind}\n")
    (pci / "gone").mkdir(parents=True)
    for platforms, uses in (({}, True), ({"JAX_PLATFORMS": "tpu,cpu"}, True), ({"JAX_PLATFORMS": "cpu"}, False)):
        assert cluster.has_tpu(platforms, str(dev), str(pci)) is (expected and uses)


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


def test_slurm_says_where_process_0_is(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "4711")
    assert cluster.find(SLURM, 5) == ("node003:4711", 2, 1)


def test_a_tpu_without_metadata_is_one_host(monkeypatch):
    for name in (*SLURM, "KUBERNETES_SERVICE_HOST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert cluster.find({}, 5) == ("", 1, 0)
    monkeypatch.setattr(cluster, "has_tpu", lambda environment: True)
    processes.start(processes.Place(), {})
    assert processes.count() == 1


@pytest.mark.filterwarnings("ignore:Kubernetes environment detected")
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            r"pip install 'selfreward-jax\[k8s\]'",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "one process of several"),
    ],
)
def test_others_that_cannot_be_found_are_one_line(monkeypatch, environment, says):
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)  # not installed
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        processes.start(processes.Place(), {})


def test_what_a_cluster_refuses_is_one_line(monkeypatch):
    from jax._src.clusters import ClusterEnv

    def refused(*_):
        raise RuntimeError("Kubernetes API Error: 403 - Forbidden\nthe service account may not\n   read pods")

    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", refused)
    with pytest.raises(
        UserError, match=r"403 - Forbidden the service account may not read pods\); mend that, or give"
    ):
        cluster.find({}, 5)
    monkeypatch.delattr(ClusterEnv, "auto_detect_unset_distributed_params")
    assert cluster.find({}, 5) is None  # a later jax: it is left to find out itself
