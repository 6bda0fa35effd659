"""Compile Triton kernels for NVIDIA GPUs on a machine without one: what the interpreter takes may still not compile.

`compiles([("opsin.data.kernels", "resize", {"x": "*u8", "n": "i32", "BLOCK": 64}), …])` runs in a process of its own,
because the interpreter, which the other tests use, replaces the kernels when their module is imported. Types are
Triton's: "*bf16" points to bf16, "i32" is a number; a Python value makes a `tl.constexpr` of the argument.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

CAPABILITIES = (80, 90)
"""A100 and H100."""

Job = tuple[str, str, dict[str, Any]]


def compiles(jobs: Sequence[Job]) -> None:
    """Compile every (module, kernel, arguments) for A100 and H100; fails with the compiler's message."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, json.dumps(jobs)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(jobs) * len(CAPABILITIES), done.stdout


def main() -> None:
    """Compile the jobs in argv[1] and write a line for each: kernel, capability, bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for module, name, arguments in json.loads(sys.argv[1]):
        kernel = getattr(importlib.import_module(module), name)
        constants = {key: value for key, value in arguments.items() if not isinstance(value, str)}
        signature = {key: "constexpr" if key in constants else value for key, value in arguments.items()}
        for capability in CAPABILITIES:
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= 160 * 1024, f"{name} wants {compiled.metadata.shared} bytes"
            sys.stdout.write(f"{name} {capability} {compiled.metadata.shared}\n")


if __name__ == "__main__":
    main()
