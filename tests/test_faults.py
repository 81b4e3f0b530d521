"""What a sweep survives. Afterwards every result is there exactly once, and equal to an undisturbed
run's.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

import rotlib as rl
from rotlib.disk import ROOT
from rotlib.study import store
from rotlib.study.recipe import OWN
from rotlib.study.sweep_file import read_sweep

pytestmark = pytest.mark.slow
ENVIRONMENT = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


OWN_ROTATION = """
import rotlib as rl


@rl.register_rotation("mine")
def mine(model, seed=0, R3=False, R4=False):
    return rl.random_rotation(model, seed + 7, R3, R4)
"""


@pytest.fixture(autouse=True)
def none_registered():
    yield
    OWN.clear()


def start(folder, engine):
    command = [
        sys.executable,
        "-m",
        "rotlib.study.sweep",
        str(folder / "sweep.yaml"),
        "--workers",
        "2",
        "--engine",
        engine,
    ]
    heed = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # a shell's background jobs are started to ignore it
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True, **heed)


def wait_for_results(folder, run, count=1):
    while len(found := list(results_in(folder))) < count:
        assert run.poll() is None
        time.sleep(0.02)
    return found


def results_in(folder):
    return (folder / "results" / "local").glob("quantize-*.json")


def assert_as_undisturbed(folder):
    recipes = read_sweep(folder / "sweep.yaml")
    assert len(list(results_in(folder))) == len(recipes)
    assert not list((folder / "results" / "local").glob("*.partial"))
    disturbed = [store.find(recipe.spec()).metrics for recipe in recipes]
    for file in (folder / "results" / "local").iterdir():
        file.unlink()
    assert [result.metrics for result in rl.run_all(recipes)] == disturbed


def workers_of(run, name):
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # git, say, which a result's provenance asks
            found += [process] if name in " ".join(process.cmdline()) else []
    return found


def kill_a_worker(run, name):
    workers = workers_of(run, name)
    workers[0].kill()
    return workers


def assert_gone(workers):
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_a_local_sweep_outlives_its_driver_an_interruption_and_a_worker(folder):
    """Killed, it leaves no worker behind; interrupted, it ends in order. The same command goes on,
    and a killed worker costs it nothing but time.
    """
    done = 0
    for how, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        run = start(folder, "local")
        wait_for_results(folder, run, done + 1)
        workers = workers_of(run, "spawn_main")
        run.send_signal(how)
        assert run.wait(timeout=60) == status
        assert_gone(workers)
        done = len(list(results_in(folder)))  # workers may finish one after their driver's end
        assert done < 8
    run = start(folder, "local")
    wait_for_results(folder, run, done + 1)
    kill_a_worker(run, "spawn_main")
    assert run.wait(timeout=300) == 0
    assert_as_undisturbed(folder)


def test_a_ray_cluster_outlives_a_worker_and_its_driver_and_the_slurm_script_does_the_rest(folder):
    """The script also computes a torn result anew; it has stand-ins for SLURM's own two commands,
    on an allocation of this one machine.
    """
    (folder / "mine.py").write_text(OWN_ROTATION)  # it goes to the workers, too
    path = folder / "sweep.yaml"
    path.write_text("rotations: [mine.py]\n" + path.read_text().replace("hadamard", "mine"))
    run = start(folder, "ray")
    torn = wait_for_results(folder, run)[0]
    workers = kill_a_worker(run, "ray::_work_there")
    wait_for_results(folder, run, 3)
    cluster = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert_gone(workers)  # they notice, and end
    for process in cluster:  # Ray's own, which the script's cluster would wait for at its end
        with suppress(psutil.NoSuchProcess):
            process.kill()
    torn.write_text(torn.read_text()[:100])
    for name, script in {"scontrol": "echo 127.0.0.1", "srun": 'exec "$@"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    allocation = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
    }
    command = [ROOT / "configs" / "slurm.sh", path]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT | allocation, check=True, timeout=300
    )
    assert_as_undisturbed(folder)


def test_a_full_disk_is_told_and_the_rest_runs_once_there_is_room(folder):
    """On a file system of 16 KiB, in a mount namespace of its own."""
    results = folder / "results"
    results.mkdir()
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=16k none {results}"
    if subprocess.run([*inside, mount], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = f"{sys.executable} -m rotlib.study.sweep {folder / 'sweep.yaml'} --workers 1"
    script = (
        f"{mount}; {command}; echo rc $?; mount -o remount,size=64m {results}; {command}; "
        f"echo rc $?; cp -r {results}/local {folder}/kept"
    )
    run = subprocess.run(
        [*inside, script], env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert [line for line in run.stdout.splitlines() if line.startswith("rc")] == [
        "rc 1",
        "rc 0",
    ], run.stderr
    assert "No space left on device" in run.stderr or "is the disk full?" in run.stderr
    (folder / "kept").rename(results / "local")
    assert_as_undisturbed(folder)
