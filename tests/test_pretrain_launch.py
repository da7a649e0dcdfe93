"""The launch files of ``examples/pretrain``, by their validators, and run with stand-ins."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sysconfig
import time

import jsonschema
import pytest
import yaml

import slurm_stand_in
from jobset_schema import SCHEMA

pytestmark = pytest.mark.one_process("looks at files, and starts programs of its own")

LAUNCH = pathlib.Path(__file__).parents[1] / "examples" / "pretrain" / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])


def program(name: str) -> str:
    """A program that a wheel has brought; the test extra lists the wheels."""
    scripts = [sysconfig.get_path("scripts"), os.environ["PATH"]]
    found = shutil.which(name, path=os.pathsep.join(scripts))
    assert found is not None, f"no {name}: pip install -e '.[test]'"
    return found


def check(*command: str | pathlib.Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_pass_shellcheck():
    assert len(SCRIPTS) == 5
    check(program("shellcheck"), "--external-sources", *SCRIPTS)


def test_shellcheck_would_find_a_mistake(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -rf $1/tmp\n")
    with pytest.raises(AssertionError, match="SC2086"):
        check(program("shellcheck"), tmp_path / "bad.sh")


def test_dockerfile_passes_hadolint():
    check(program("hadolint"), LAUNCH / "Dockerfile")


def job_set():
    return yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())


def test_jobset_has_the_fields_of_the_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job_set(), SCHEMA)
    wrong = job_set()
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelizm"] = 32
    with pytest.raises(jsonschema.ValidationError, match="'parallelizm' was unexpected"):
        jsonschema.validate(wrong, SCHEMA)


def test_jobset_agrees_with_itself():
    """Hosts, the coordinator's name, ports and volumes are stated more than once."""
    spec = job_set()["spec"]
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(env["NUM_HOSTS"])
    host, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
    name, subdomain = job_set()["metadata"]["name"], spec["network"]["subdomain"]
    assert host == f"{name}-{workers['name']}-0-0.{subdomain}"
    assert {"containerPort": int(port)} in container["ports"]
    assert env["PROCESSES_PER_HOST"] == container["resources"]["limits"]["nvidia.com/gpu"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    command = pathlib.Path(container["command"][0])
    assert command.relative_to("/opt/jax_ep/examples/pretrain/launch") == pathlib.Path(
        "one_host.sh"
    )
    assert "COPY examples /opt/jax_ep/examples" in (LAUNCH / "Dockerfile").read_text()


def test_every_setting_is_explained():
    """Each variable and each XLA flag of settings.sh, and each that scripts read, has its row."""
    readme = (LAUNCH / "README.md").read_text()
    settings = (LAUNCH / "settings.sh").read_text()
    one_host = (LAUNCH / "one_host.sh").read_text()
    names = set(re.findall(r"\b(?:export )?([A-Z][A-Z_]+)=", settings))
    names |= set(re.findall(r"--(xla_\w+)=", settings))
    names |= set(re.findall(r"\$\{([A-Z][A-Z_]+):-", settings + one_host)) - {
        "PYTHONPATH",
        "TMPDIR",
    }
    assert len(names) > 15
    missing = {name for name in names if not re.search(f"`(--)?{name}`", readme)}
    assert not missing


@pytest.fixture
def stand_in(tmp_path) -> dict[str, str]:
    """A Python that says how it was started, and ends as ``END`` says: a status, or at a signal."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/bash\n"
        "trap 'kill $!; echo $JAX_PROCESS_ID saved; exit 143' TERM\n"
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS'
        ' gpu $CUDA_VISIBLE_DEVICES: $*"\n'
        'if [[ "$JAX_PROCESS_ID" == "$END" ]]; then exit 3; fi\n'
        'if [[ "$END" == never ]]; then sleep 600 >&- 2>&- & wait; fi\n'
    )
    script.chmod(0o755)
    return os.environ | {"PYTHON": str(script), "PROCESSES_PER_HOST": "2"}


def start_one_host(env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [LAUNCH / "one_host.sh", *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_host_starts_a_process_for_each_gpu(stand_in):
    hosts = {"NUM_HOSTS": "3", "JOB_COMPLETION_INDEX": "2", "JAX_COORDINATOR_ADDRESS": "h:99"}
    process = start_one_host(stand_in | hosts | {"END": "none"}, "--config", "a b")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    rest = "-m examples.pretrain.train --config a b"
    assert sorted(out.splitlines()) == [
        f"4 of 6 at h:99 gpu 0: {rest}",
        f"5 of 6 at h:99 gpu 1: {rest}",
    ]


def test_one_host_gives_the_status_of_the_first_that_fails(stand_in):
    process = start_one_host(stand_in | {"END": "1"})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "process 1 of host 0 ended with status 3" in error


def test_one_host_passes_a_signal_on(stand_in):
    process = start_one_host(stand_in | {"END": "never"})
    assert process.stdout is not None
    started = [process.stdout.readline() for _ in range(2)]
    assert all("gpu" in line for line in started)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == ["0 saved", "1 saved"]
    assert process.returncode == 143


def test_one_host_ends_a_process_that_hangs_after_another_failed(stand_in, tmp_path):
    script = pathlib.Path(stand_in["PYTHON"])
    script.write_text(
        '#!/bin/bash\nif [[ "$JAX_PROCESS_ID" == 1 ]]; then exit 3; fi\nexec sleep 600\n'
    )
    begun = time.monotonic()
    process = start_one_host(stand_in | {"GRACE_SECONDS": "0.2"})
    process.communicate(timeout=60)
    assert process.returncode == 3 and time.monotonic() - begun < 60


def test_several_hosts_need_a_coordinator(stand_in):
    env = {name: value for name, value in stand_in.items() if not name.startswith("JAX_COORD")}
    process = start_one_host(env | {"NUM_HOSTS": "2", "END": "none"})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "NUM_HOSTS=2 needs JAX_COORDINATOR_ADDRESS=host:port of the first host" in error


def test_pyxis_starts_the_task_in_the_image(tmp_path):
    env = os.environ | slurm_stand_in.install(tmp_path / "slurm")
    script = str(LAUNCH / "slurm" / "pyxis.sbatch")
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "IMAGE: the image, as enroot names it" in done.stderr
    env |= {"IMAGE": "team/jax_ep", "MOUNTS": "/a:/a"}
    subprocess.run(["bash", script, "--config", "tiny"], env=env, check=True)
    ((name, *arguments),) = slurm_stand_in.calls(tmp_path / "slurm")
    assert name == "srun"
    assert {"--container-image=team/jax_ep", "--container-mounts=/a:/a"} < set(arguments)
    task = "/opt/jax_ep/examples/pretrain/launch/slurm/task.sh"
    assert arguments[arguments.index(task) :] == [task, "--config", "tiny", "--resume"]
