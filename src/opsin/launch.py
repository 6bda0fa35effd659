"""Slurm: hands an `opsin` command to the queue, and puts it back there when its time is over or its place is taken.

The job is one task per process of the run. submitit writes the batch script and, in every task, unpickles a `Task` and
calls it. Nothing else in the package needs Slurm or submitit.
"""

import contextlib
import io
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from opsin.errors import FINITE, OpsinError, within

PROGRAM = "opsin.cli:main"
"""What a task calls with the words of the command, by name: another process runs it, on another machine."""
SAVE = signal.SIGHUP
"""Sent by Slurm near the time limit, and on some clusters at preemption: a run answers by saving its state
(pretrain/stop.py), and nothing else sends it to a job. submitit's own choice, SIGUSR2, would end the run."""


@dataclass(frozen=True)
class Slurm:
    """What a job asks of the cluster; where nothing is given, the cluster's own default holds."""

    nodes: int = 1
    """Machines."""
    gpus: int = 1
    """GPUs per node, each with a process of its own; 0 for none."""
    processes: int | None = None
    """Processes per node; by default one per GPU, or one."""
    hours: float = 24.0
    """Time limit. Near its end the run saves its state and the job goes back into the queue, to go on from there."""
    partition: str | None = None
    """Of the cluster."""
    account: str | None = None
    """That is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    cpus: int | None = None
    """CPU cores per process."""
    memory: float | None = None
    """GiB per node."""
    name: str = "opsin"
    """Of the job in the queue."""
    setup: tuple[str, ...] = ()
    """Shell commands that run before the processes start, such as 'module load cuda'."""
    log: Path = Path("runs/slurm")
    """Folder for logs and the job's own files, which every node must see."""
    notice: int = 180
    """How long before the time limit the run is told to save its state: more than a step and a checkpoint take."""
    requeues: int = 100
    """Times that the job may go back into the queue."""

    def __post_init__(self) -> None:
        within(self, "--", nodes=(1, FINITE), gpus=(0, FINITE), hours=(1 / 60, FINITE), requeues=(0, FINITE))
        within(self, "--", notice=(1, self.hours * 3600))
        for name in ("processes", "cpus", "memory"):
            if getattr(self, name) is not None:
                within(self, "--", **{name: (1, FINITE)})
        if self.gpus and self.processes not in (None, self.gpus):
            raise OpsinError(
                f"--processes is {self.processes} with {self.gpus} GPUs per node: a GPU has one process, so leave "
                "--processes out, or give --gpus 0."
            )

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return self.processes or self.gpus or 1


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: str
    """Its number."""
    log: Path
    """What its first process prints; there is one more file like it per process."""


def submit(command: Sequence[str], slurm: Slurm) -> Submitted:
    """Hand a command to the queue.

    Args:
        command: the words of an opsin command line, checked already.
        slurm: what the job asks for.

    Raises:
        OpsinError: without Slurm or submitit, and with sbatch's own words if it refuses the job.
    """
    missing = [program for program in ("sbatch", "srun", "scontrol", "squeue") if shutil.which(program) is None]
    if missing:
        raise OpsinError(
            f"there is no Slurm here ({', '.join(missing)} not found): give this command on a login node of the "
            "cluster, or start the processes with torchrun."
        )
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError:
        raise OpsinError("opsin launch slurm needs submitit: pip install 'opsin[slurm]'.") from None

    wanted = {
        "nodes": slurm.nodes,
        "ntasks_per_node": slurm.per_node,
        "gpus_per_node": slurm.gpus or None,
        "time": max(1, round(slurm.hours * 60)),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "cpus_per_task": slurm.cpus,
        "mem": None if slurm.memory is None else f"{round(slurm.memory * 1024)}M",
        "job_name": slurm.name,
        "setup": [f"export SUBMITIT_PREEMPT_SIGNAL={SAVE.name.removeprefix('SIG')}", *slurm.setup],
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "signal": f"{SAVE.name.removeprefix('SIG')}@{slurm.notice}"},
        # A process that fails ends the others, which would wait for it. srun no longer takes the cores from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else [])],
    }
    try:
        executor = SlurmExecutor(slurm.log, max_num_timeout=slurm.requeues)
        executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the errors below say too
            job = executor.submit(Task(tuple(command), slurm.requeues))
    except OSError as error:
        raise OpsinError(f"cannot write into --log {slurm.log}: {error.strerror}. Choose another folder.") from None
    except (FailedJobError, FailedSubmissionError) as error:
        raise OpsinError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
    return Submitted(job.job_id, job.paths.stdout)


@dataclass(frozen=True)
class Task:
    """One process of the job: joins the others and runs the command."""

    command: tuple[str, ...]
    """The words of an opsin command line."""
    requeues: int
    """Times that the job may still go back into the queue."""

    def __call__(self) -> None:
        """Run the command; a status other than 0 becomes that of the process."""
        os.environ.update(environment())
        first = os.environ["RANK"] == "0"
        if first:  # submitit ignores SIGTERM
            signal.signal(signal.SIGTERM, _told_to_end)
        status = pkgutil.resolve_name(PROGRAM)(list(self.command))
        if status in (128 + SAVE, 128 + signal.SIGTERM):  # in all processes alike, and all is saved
            if not first:
                return  # in order: one that fails would end the first, which has something left to do
            signal.raise_signal(status - 128)  # once more, for the handlers that the loop of the run had replaced
        if status:
            sys.exit(status)

    def checkpoint(self) -> Any:
        """What runs when the job starts again, for submitit: the same command, which goes on where it stopped."""
        from submitit.helpers import DelayedSubmission

        if self.requeues == 0:
            sys.stderr.write("opsin: the job went back as often as --requeues allows: launch it again to go on.\n")
            sys.exit(2)
        return DelayedSubmission(replace(self, requeues=self.requeues - 1))


def _told_to_end(number: int, _: FrameType | None) -> None:
    """Answer SIGTERM, which announces preemption as well as scancel; only scancel marks the job as cancelled first.

    Slurm would not put back a job that ends by itself in the time it is left before preemption.
    """
    state = ["squeue", "--noheader", "--format=%T", f"--job={os.environ['SLURM_JOB_ID']}"]
    if subprocess.run(state, capture_output=True, text=True, check=False).stdout.strip() == "RUNNING":
        signal.raise_signal(SAVE)  # to submitit's handler, which puts the job back and exits
    sys.exit(128 + number)


def environment() -> dict[str, str]:
    """The variables that torchrun would set, from submitit's account of the job."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
        "MASTER_ADDR": job.hostnames[0],
        # Jobs that share a node need a port each; below those that systems give to outgoing connections.
        "MASTER_PORT": str(20_000 + int(job.raw_job_id) % 10_000),
    }
