"""How fast a Llama-2-7B shape is ingested on one GPU, beside the paper; a tiny shape on the CPU where there is none.

scripts/bench gpu [--only lora,lora-wide,full] [--small] [--seconds 60] [--batch-tokens N] [--precision high]

Random weights: LoRA of rank 512 on q, k, v, o over NF4 (D = 536,870,912) at K = 2^16 and 2^20, and all parameters in
bfloat16 at K = 2^16, over 52,000 samples of Alpaca's lengths (from the folder that RAPIDIN_SHARED names, where there is
one). A stratified sample of their batches is timed and extrapolated. Each configuration runs in a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
try:
    import rapidin_vdb  # noqa: F401
except ImportError:  # not installed
    sys.path.insert(0, str(HERE.parent))

from gpu_measure import SAMPLES, measure, tell  # noqa: E402
from ingest import machine  # noqa: E402

CONFIGURATIONS = {
    "lora": {"kind": "lora", "width": 1 << 16, "small_width": 1 << 10},
    "lora-wide": {"kind": "lora", "width": 1 << 20, "small_width": 1 << 12},
    "full": {"kind": "full", "width": 1 << 16, "small_width": 1 << 10},
}


def this_machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    import importlib.metadata

    import torch

    found: dict[str, Any] = dict(machine())
    for name in ("triton", "transformers", "peft", "bitsandbytes", "lancedb"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name(0)
        found["device_bytes"] = torch.cuda.get_device_properties(0).total_memory
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return found


def apart(limit: float, **options: Any) -> dict[str, Any]:
    """Measure one configuration in a process of its own; where it fails, return why."""
    command = [sys.executable, __file__, "--apart", json.dumps(options)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {done.stdout.strip()[-2000:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what is asked for, and write it down after each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="which configurations, by comma")
    parser.add_argument("--small", action="store_true", help="a tiny shape on the CPU, to see that it runs")
    parser.add_argument("--seconds", type=float, help="how long to time each configuration (60; small: 2)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a configuration is given up")
    parser.add_argument("--batch-tokens", type=int, help="tokens a batch; by default as an ingest chooses them")
    parser.add_argument("--shuffles", type=int, default=20, help="lambda")
    parser.add_argument("--precision", default="highest", choices=("highest", "high"), help="of float32 products")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json", help="where results are written")
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        try:
            print(json.dumps(measure(**json.loads(options.apart))))
        except Exception as error:
            print(f"{type(error).__name__}: {error}")  # the parent keeps it
            raise
        return
    import torch

    small = options.small or not torch.cuda.is_available()
    on = this_machine()
    for name in options.only.split(","):
        chosen = CONFIGURATIONS[name]
        tell(f"--- {name}")
        result = apart(
            options.limit,
            kind=chosen["kind"],
            shape="small" if small else "7b",
            width=chosen["small_width" if small else "width"],
            shuffles=options.shuffles,
            seconds=options.seconds or (2 if small else 60),
            batch_tokens=options.batch_tokens,
            samples=1024 if small else SAMPLES,
            precision=options.precision,
        )
        print(json.dumps({name: result}, indent=1), flush=True)
        if "error" not in result:
            paper = "" if small else f" (paper: {result['paper_hours']} h)"
            tell(
                f"{name}: {result['samples_per_second']:.1f} samples/s, {result['hours']:.2f} h for {SAMPLES:,}{paper}"
            )
        if not small:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            # Runs of other configurations stay; each says when and where it was taken.
            known = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {}
            known[name] = {"command": "scripts/bench gpu " + " ".join(sys.argv[1:]), "machine": on} | result
            options.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
