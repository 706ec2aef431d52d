"""A real one-node Slurm on this machine runs the workflow; a job that it cancels goes on."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import copy_repository
from tests.workflow import assert_same_tables

# The plugin's jobs read no other place, whatever SLURM_CONF says.
CONFIGURATION = Path("/etc/slurm/slurm.conf")


def missing() -> str | None:
    """Why no Slurm can be started here, if none can."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        return "slurmctld is not installed: apt-get install slurm-wlm"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "the plugin is not installed: pip install -c requirements.lock -e '.[slurm]'"
    if os.geteuid() != 0:
        return "starting Slurm's daemons takes root"
    if os.path.lexists(CONFIGURATION):
        return f"{CONFIGURATION} exists: another Slurm is in use here"
    return None


REASON = missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# No munge, no database: one user on one machine. Memory is claimed, not there.
SLURM = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
EnforcePartLimits=ALL
ReturnToService=2
KillWait=5
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=24000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Path]:
    """Folder of a running one-node Slurm, which ends with the test."""
    folder = tmp_path / "slurm"
    for name in ("controller", "node"):
        (folder / name).mkdir(parents=True)
    controller, node = free_ports(2)
    host = socket.gethostname().partition(".")[0]
    text = SLURM.format(host=host, folder=folder, controller=controller, node=node)
    (folder / "slurm.conf").write_text(text)
    CONFIGURATION.symlink_to(folder / "slurm.conf")
    try:
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["srun", "true"], check=True, timeout=60)
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root"], check=False)
        for daemon in ("slurmd", "slurmctld"):
            if (folder / f"{daemon}.pid").exists():
                os.kill(int((folder / f"{daemon}.pid").read_text()), signal.SIGTERM)
        CONFIGURATION.unlink()


def small_experiment(where: Path, shards: int) -> None:
    """Two methods of smoke, certified long enough to be interrupted."""
    path = where / "config/smoke.yaml"
    values = yaml.safe_load(path.read_text())
    values["methods"] = {name: values["methods"][name] for name in ("head", "lora")}
    certification = {"mode": "cohen", "n0": 32, "n": 4096, "test_images": 24, "batch_size": 256}
    values["certification"] = {**certification, "shards": shards}
    path.write_text(yaml.safe_dump(values, sort_keys=False))


RUN = [sys.executable, "-m", "snakemake", "results/smoke/tables/summary.csv"]
RUN += ["--configfile", "config/smoke.yaml"]
ON_SLURM = ["--workflow-profile", "profiles/slurm", "--latency-wait", "5"]
ON_SLURM += ["--slurm-init-seconds-before-status-checks", "1"]
SUBMITTED = re.compile(r"SLURM jobid (\d+) \(log: \S*rule_certify_shard/lora\S*_(\d-of-\d)/")


def cancel_a_shard(run: subprocess.Popen[str], where: Path) -> tuple[str, str, bytes, Path]:
    """Cancel the first shard of LoRA that is submitted, once it has kept votes.

    Returns:
        What the driver said until then, the job's id, the votes kept, and their file.
    """
    said = ""
    assert run.stderr is not None
    for line in run.stderr:
        said += line
        if found := SUBMITTED.search(line):
            break
    else:
        raise AssertionError(said)
    job, shard = found.groups()
    shards = where / "results/smoke/certificates/lora/sigma_0.50/seed_0.shards"
    votes = shards / f"{shard}.votes.jsonl"
    # Its first line says what the votes mean.
    while not votes.exists() or votes.read_bytes().count(b"\n") < 2:
        assert run.poll() is None
        ended = subprocess.run(["squeue", "--jobs", job, "--noheader"], capture_output=True)
        assert ended.stdout, f"job {job} ended before it kept votes"
    subprocess.run(["scancel", job], check=True)
    return said, job, votes.read_bytes(), votes


def job_states(slurm: Path) -> dict[str, str]:
    """State of every job by id, as Slurm recorded its end."""
    text = (slurm / "jobcomp.log").read_text()
    return dict(re.findall(r"JobId=(\d+) .*?JobState=(\w+)", text))


def write_evidence(slurm: Path, said: str, cancelled: str, equal: list[str]) -> None:
    """Keep what happened in `slurm`/slurm.log: what the driver said of jobs, and their ends."""
    told = re.compile(r"^(rule |localrule |\[|Job \d|Finished|Error in|Trying|SLURM|\d+ of)")
    shown = said.replace(f"{slurm.parent}/cluster/repository/", "")
    lines = [line for line in shown.splitlines() if told.match(line)]
    jobs = (slurm / "jobcomp.log").read_text().splitlines()
    wanted = ("JobId", "JobState", "StartTime", "EndTime", "Tres")
    ends = [" ".join(p for p in job.split() if p.startswith(wanted)) for job in jobs]
    ends += ["", f"by the test: scancel {cancelled}"]
    ends += [f"equal to the local run's, unsharded: {', '.join(equal)}"]
    (slurm / "slurm.log").write_text("\n".join([*lines, "", *ends]) + "\n")


@pytest.mark.fault(
    fault="job cancelled by the cluster",
    stage="certify",
    outcome="submitted again; continues from its votes; tables equal those of a local run",
)
def test_slurm_finds_what_a_local_run_finds_in_spite_of_a_cancelled_job(slurm, tmp_path, fetched):
    copies = {}
    for name, shards in (("local", 1), ("cluster", 2)):
        (tmp_path / name).mkdir()
        copies[name] = copy_repository(tmp_path / name, fetched)
        small_experiment(copies[name], shards)
    where = copies["cluster"]
    run = subprocess.Popen(
        [*RUN, *ON_SLURM], cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        said, job, kept, votes = cancel_a_shard(run, where)
        said += run.communicate()[1]
    finally:
        # Jobs of a driver that is killed are cancelled with the daemons.
        run.kill()
    assert run.returncode == 0, said
    states = job_states(slurm)
    assert states.pop(job) == "CANCELLED"
    assert set(states.values()) == {"COMPLETED"}
    # pretrain, 2 trainings, 4 shards (one once more), tables, and the first srun.
    assert len(states) == 9
    assert votes.read_bytes().startswith(kept)
    local = subprocess.run([*RUN, "--cores", "2"], cwd=copies["local"], capture_output=True)
    assert local.returncode == 0, local.stderr
    write_evidence(slurm, said, job, assert_same_tables(where, copies["local"]))
