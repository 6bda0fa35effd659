"""As much of Slurm as a job of ours meets, on this machine: queue, run, signal, requeue. Only for tests.

`install(folder)` writes sbatch, srun, scontrol and scancel there; put the folder on PATH. A job's state lies in files
beside them: <job>.state as squeue tells it, the processes of its tasks in <job>.tasks, its status in <job>.ended.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ.get("STAND_IN_SLURM", ""))


def install(folder: Path) -> dict[str, str]:
    """Write the programs; returns the environment variables with which they work."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "scancel", "squeue"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)
    return {"STAND_IN_SLURM": str(folder), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def sbatch(script: str) -> int:
    if "--partition=full" in Path(script).read_text():
        sys.stderr.write("sbatch: error: invalid partition specified: full\n")
        return 1
    job = str(7000 + len(list(HERE.glob("*.script"))))
    (HERE / f"{job}.script").write_text(Path(script).read_text())
    (HERE / f"{job}.state").write_text("PENDING")
    subprocess.Popen([sys.executable, __file__, "keep", job], start_new_session=True, stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    sys.stdout.write(f"Submitted batch job {job}\n")
    return 0


def keep(job: str) -> int:
    """Run the script, and again each time that it was put back."""
    script = HERE / f"{job}.script"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.M))
    nodes, per_node = int(asked["nodes"]), int(asked["ntasks-per-node"])
    environment = os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
    }
    for _ in range(4):
        (HERE / f"{job}.state").write_text("RUNNING")
        with Path(asked["output"].replace("%j", job)).open("a") as log:
            done = subprocess.run(["bash", script], env=environment, stdout=log, stderr=log, timeout=120, check=False)
        requeued = HERE / f"{job}.requeue"
        if not requeued.exists():
            break
        requeued.unlink()
    (HERE / f"{job}.ended").write_text(str(done.returncode))
    return 0


def srun(*arguments: str) -> int:
    """Start the tasks; one that fails ends the others."""
    job, tasks = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NTASKS"])
    per_node = tasks // int(os.environ["SLURM_JOB_NUM_NODES"])
    output = arguments[arguments.index("--output") + 1].replace("%j", job)
    command = list(arguments[arguments.index("--kill-on-bad-exit=1") + 1 :])
    processes = []
    for task in range(tasks):
        number = {"SLURM_PROCID": task, "SLURM_LOCALID": task % per_node, "SLURM_NODEID": task // per_node}
        with Path(output.replace("%t", str(task))).open("a") as log:
            environment = os.environ | {name: str(value) for name, value in number.items()}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    (HERE / f"{job}.tasks").write_text(" ".join(str(process.pid) for process in processes))
    worst = 0
    while not worst and any(process.poll() is None for process in processes):
        worst = max((abs(process.poll() or 0) for process in processes), default=0)
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
    return max(abs(process.returncode) for process in processes)


def scontrol(verb: str, job: str) -> int:
    assert verb == "requeue"
    (HERE / f"{job}.requeue").touch()
    return 0


def scancel(*arguments: str) -> int:
    """`scancel JOB`, or `scancel --signal=HUP JOB`."""
    *options, job = arguments
    name = options[0].partition("=")[2] if options else "TERM"
    if not options:
        (HERE / f"{job}.state").write_text("CANCELLED")
    for process in (HERE / f"{job}.tasks").read_text().split():
        os.kill(int(process), signal.Signals[f"SIG{name}"])
    return 0


def squeue(*arguments: str) -> int:
    job = arguments[-1].removeprefix("--job=")
    sys.stdout.write((HERE / f"{job}.state").read_text() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(
        {call.__name__: call for call in (sbatch, keep, srun, scontrol, scancel, squeue)}[sys.argv[1]](*sys.argv[2:])
    )
