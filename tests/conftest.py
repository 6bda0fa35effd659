import os

# One thread per test process: two processes run at a time, and threads that fight for a core are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("opsin", deadline=None)  # a busy machine is no failure
settings.load_profile("opsin")
