"""Which device a rank takes, and what is refused before ranks start."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import core.gpus
import parallel.world
from core.errors import ConfigError
from core.gpus import gpu_of_rank, own_gpus, usable_gpus, visible_gpus
from core.launch_environment import local_ranks
from parallel.device import CPU, CudaStopwatch, backends, rank_device, refuse_shared_gpus
from parallel.mesh import own_mesh
from training import launch as main
from training.presets import PRESETS
from workflow.demo import demo_stages, fitted
from workflow.demo_config import DemoConfig

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives this machine the device files of some GPUs, and a torch that is built for them."""

    def have(*minors: int) -> None:
        for minor in minors:
            (tmp_path / f"nvidia{minor}").touch()
        for other in ("nvidiactl", "nvidia-uvm"):
            (tmp_path / other).touch()
        monkeypatch.setattr(core.gpus, "DEVICES", tmp_path)
        monkeypatch.setattr(core.gpus, "built_for_cuda", lambda: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return have


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives torch some GPUs; returns the list of devices that become current."""
    chosen: list[int] = []

    def sees(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return sees


@pytest.mark.parametrize(
    ("named", "count"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("1", 1),
        ("0,1", 2),
        ("1,-1,0", 1),
        ("0,7", 1),
        (" 0, 1 ", 2),
        ("0,0", 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("NoDevFiles", 0),
    ],
)
def test_visible_gpus_are_counted_as_cuda_does(named: str | None, count: int, gpus: Any) -> None:
    """Pods may see device files that begin above 0; CUDA numbers the visible ones from 0."""
    gpus(3, 5)
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    assert visible_gpus(environment) == usable_gpus(environment) == count


def test_a_build_for_cpus_uses_no_gpu(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    assert usable_gpus({}) == 1
    monkeypatch.setattr(core.gpus, "built_for_cuda", lambda: False)
    assert usable_gpus({}) == 0


def test_the_build_of_torch_is_known_without_importing_it() -> None:
    assert core.gpus.built_for_cuda() == (torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "2"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "1"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"}, 4),
    ],
)
def test_ranks_of_a_machine_are_counted(environment: dict[str, str], count: int) -> None:
    assert local_ranks(environment) == count


def test_ranks_that_share_what_they_see_take_one_gpu_each() -> None:
    assert [gpu_of_rank(rank, 2, 8, False) for rank in range(2)] == [(0, []), (1, [])]
    index, problems = gpu_of_rank(1, 2, 1, False)
    assert index == 0 and "2 ranks on this machine, but 1 visible GPU" in problems[0]
    for own in (False, True):
        assert gpu_of_rank(-1, 2, 2, own)[1], "-1 would be the last GPU of a list"


def test_ranks_that_see_their_own_gpu_alone_take_the_first() -> None:
    """srun --gpus-per-task=1: four ranks with different local ranks, and each sees one GPU."""
    slurm = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_GPUS_PER_TASK": "1"}
    assert own_gpus(slurm) and not own_gpus({**slurm, **TORCHRUN})
    assert [gpu_of_rank(rank, 4, 1, own_gpus(slurm))[0] for rank in range(4)] == [0] * 4


def test_two_ranks_on_one_gpu_are_refused_before_ranks_start(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0)
    started: list[Any] = []
    monkeypatch.setattr(main, "supervise", lambda *given: started.append(given))
    settings = PRESETS["prior"]["tiny"]()
    with pytest.raises(ConfigError, match="2 ranks on this machine, but 1 visible GPU, and each"):
        main.train_stage("prior", settings)
    assert not started
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    main.train_stage("prior", settings)
    assert len(started) == 1, "with hidden GPUs the ranks train on the CPU"


def test_a_rank_takes_its_device_once(cuda: Any) -> None:
    assert rank_device({}) == CPU
    chosen = cuda(2)
    environment = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **TORCHRUN}
    assert rank_device(environment) == torch.device("cuda", 1)
    assert own_mesh().world.device == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="3 ranks on this machine, but 2 visible GPUs"):
        rank_device({**environment, "LOCAL_WORLD_SIZE": "3"})
    assert chosen == [1, 0], "what is refused leaves CUDA alone"


def test_two_ranks_that_were_shown_the_same_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """srun without --gpus-per-task on a machine with one GPU: each rank sees the same one."""

    class Properties:
        uuid = "8932f937"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    store = dist.HashStore()
    refuse_shared_gpus(store, torch.device("cuda", 0), 0)
    with pytest.raises(ConfigError, match="rank 1: another rank of this world has the same GPU"):
        refuse_shared_gpus(store, torch.device("cuda", 0), 1)
    refuse_shared_gpus(store, CPU, 2)


def test_a_world_on_gpus_is_bound_to_its_device(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without device_id, NCCL guesses the GPU from the rank, and reference ranks share cuda:0."""
    cuda(2)
    made: dict[str, Any] = {}
    monkeypatch.setattr(
        dist, "init_process_group", lambda name, **given: made.update(given, of=name)
    )
    monkeypatch.setattr(dist, "new_group", lambda **given: given["backend"])
    monkeypatch.setattr(parallel.world, "refuse_shared_gpus", lambda *_: None)
    monkeypatch.setattr(parallel.world, "met_store", lambda *_: dist.HashStore())
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TAPIR_RENDEZVOUS", f"file://{tmp_path}/rendezvous")
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    world = parallel.world.join_world()
    assert world.device == made["device_id"] == torch.device("cuda", 0)
    assert made["of"] == "cpu:gloo,cuda:nccl" == backends(world.device)
    assert world.aside == "gloo"


@pytest.mark.parametrize(("gpus", "mesh"), [(0, "tp2pp2dp2"), (1, "1"), (4, "1"), (8, "tp2pp2dp2")])
def test_the_demo_trains_on_as_many_ranks_as_there_are_gpus(gpus: int, mesh: str) -> None:
    assert fitted(DemoConfig(mesh="tp2pp2dp2"), gpus).mesh == mesh


def test_the_demos_prior_goes_on_from_two_ranks_to_eight() -> None:
    stages = {stage.name: stage.commands[0] for stage in demo_stages(DemoConfig(seed=3))}
    assert list(stages).index("reshard") == list(stages).index("prior") + 1
    mesh = {"--mesh.tensor=2", "--mesh.pipeline=2", "--mesh.data=2"}
    assert mesh <= {*stages["reshard"]} and not mesh & {*stages["prior"]}
    until = {flag for flag in stages["prior"] if flag.startswith("--loop.stop-at")}
    kept = {*stages["prior"]} - until
    assert until and kept <= {*stages["reshard"]}, "else the run would be refused as another one"
    assert all("--loop.seed=3" in stages[name] for name in ("dvae", "prior", "reshard", "clip"))
    assert "--seed=3" in stages["samples"] and "--seed=3" not in stages["pack"]
    assert "reshard" not in {stage.name for stage in demo_stages(DemoConfig(mesh="1"))}


def test_a_gpus_stopwatch_counts_what_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams end in any order; unfinished work counts at a later query."""

    class Event:
        def __init__(self, at: float) -> None:
            self.at, self.over = at, False

        def query(self) -> bool:
            return self.over

        def elapsed_time(self, last: "Event") -> float:
            return last.at - self.at

    marks = [Event(at) for at in (0, 0, 1000, 2000, 5000)]
    made = iter(marks)
    monkeypatch.setattr(CudaStopwatch, "_mark", staticmethod(lambda: next(made)))
    watch = CudaStopwatch()
    for _ in range(2):
        with watch:
            pass
    assert watch.seconds() == 0
    marks[4].over = True
    assert watch.seconds() == 3
    marks[2].over = True
    assert watch.seconds() == 3 + 1 and watch.seconds() == 4
