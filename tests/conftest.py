import os
from pathlib import Path

# One thread per test process: two processes run at a time, and threads that fight for a core are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the Triton kernels run in Triton's interpreter; it must be chosen before their modules are imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

settings.register_profile("opsin", deadline=None)  # a busy machine is no failure
settings.load_profile("opsin")
