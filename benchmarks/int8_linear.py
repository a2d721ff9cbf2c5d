"""int8 linear against bfloat16 `F.linear`, the input's quantization included, as ratios of interleaved pairs.

    OMP_PROC_BIND=true python benchmarks/int8_linear.py         about a minute; writes results/int8_linear.json

Threads are pinned since a busy machine puts both on one core, where every call waits whole slices of the scheduler.
A ratio above 1 is a gain. Errors are of the same calls, against float32: ||y - y32|| / ||y32||.
"""

import json
import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from hasten.kernels import int8_linear as int8
from hasten.kernels import int8_onednn as onednn

SHAPES = [(1100, 512, 2048), (4096, 384, 1536), (256, 384, 1536), (336, 256, 1024), (162, 256, 1024)]
SQUARES = (64, 128, 192, 256, 384, 512)  # at 1024 tokens: from which width on int8 is worth it
PAIRS, TOKENS = 40, 1024
RESULT = Path(__file__).parent / "results" / "int8_linear.json"


def main():
    torch.manual_seed(0)
    with torch.no_grad():
        prepared = [prepare(*shape) for shape in SHAPES]
        print("compiled; timing", flush=True)
        rows = [measure(*p) for p in prepared]
        widths = {n: pairs(*eager(TOKENS, n, n)) for n in SQUARES}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps({"machine": machine(), "shapes": rows, "squares_1024_tokens": widths}, indent=1) + "\n"
    )
    print(RESULT.read_text())


def layer(m, k, n):
    x, w, b = torch.randn(m, k).bfloat16(), torch.randn(n, k) / k**0.5, torch.randn(n)
    q, scale = int8.quantize_rows(w)
    return x, (w, b), (w.bfloat16(), b.bfloat16()), (int8.pack(q), scale, b.bfloat16())


def eager(m, k, n):
    x, _, narrow, packed = layer(m, k, n)
    return (lambda: F.linear(x, *narrow)), (lambda: int8.int8_linear(x, *packed))


def prepare(m, k, n):
    """Pairs of calls by name, and what is known without a clock."""
    x, wide, narrow, packed = layer(m, k, n)
    plain = lambda: F.linear(x, *narrow)  # noqa: E731
    cases = {f"eager, {a}": (plain, lambda a=a: int8.int8_linear(x, *packed, a)) for a in ("token", "tensor")}
    for name, do in {"": lambda x: x, " after a layer norm": lambda x: F.layer_norm(x, (k,))}.items():
        bf16 = compiled(lambda x, do=do: F.linear(do(x), *narrow))
        both = compiled(lambda x, do=do: int8.int8_linear(do(x), *packed))
        cases[f"compiled{name}, token"] = (lambda f=bf16: f(x)), (lambda f=both: f(x))

    y = F.linear(x.float(), *wide)
    errors = {name.replace("eager", "int8"): error(f(), y) for name, (_, f) in cases.items() if "norm" not in name}
    for one, other in cases.values():
        one(), other()
    return {"m": m, "k": k, "n": n, "error": {"bf16": error(plain(), y)} | errors}, cases, x, packed


def compiled(f):
    return torch.compile(f, fullgraph=True, dynamic=False, isolate_recompiles=True)


def measure(known, cases, x, packed):
    return known | {"ratio": {name: pairs(*both) for name, both in cases.items()}, "parts_ms": parts(x, packed)}


def error(y, exact):
    return round(((y.float() - exact).norm() / exact.norm()).item(), 5)


def pairs(one, other):
    """Quantiles of time(one) / time(other) over alternating pairs, and the median times in ms."""
    for _ in range(5):
        one(), other()
    times = torch.tensor(
        [[clock(one), clock(other)] if i % 2 else [clock(other), clock(one)][::-1] for i in range(PAIRS)]
    )
    low, mid, high = (times[:, 0] / times[:, 1]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    bf16, int8_ = times.median(0).values.tolist()
    return {
        "p10": round(low, 2), "median": round(mid, 2), "p90": round(high, 2),
        "bf16_ms": round(bf16 * 1e3, 3), "int8_ms": round(int8_ * 1e3, 3),
    }  # fmt: skip


def parts(x, packed):
    """Where the int8 time goes, eager: median ms of each of the three kernels alone."""
    weight, scale_O1, bias = packed
    quantize = int8.fused(int8.quantize_tokens, "cpu")
    q, scale = quantize(x, "token", torch.uint8)
    y, s = onednn.product(q, None, weight, scale_O1, None, torch.bfloat16), scale.bfloat16()
    kernels = {
        "quantize": lambda: quantize(x, "token", torch.uint8),
        "product": lambda: onednn.product(q, None, weight, scale_O1, None, torch.bfloat16),
        "rescale": lambda: torch.addcmul(bias, y, s, out=y),
    }
    return {name: round(sorted(clock(f) for _ in range(PAIRS))[PAIRS // 2] * 1e3, 3) for name, f in kernels.items()}


def clock(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def machine():
    """What ran this: no host name, no path."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    wanted = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
    sets = [f for f in wanted if int8.cpu_features().get(f)]
    pinned = os.environ.get("OMP_PROC_BIND", "false")
    threads = {"threads": torch.get_num_threads(), "threads_pinned": pinned}
    return {"cpu": model, "instruction_sets": sets, "torch": torch.__version__} | threads


if __name__ == "__main__":
    main()
