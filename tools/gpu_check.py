"""Check and time the generated kernels on a GPU: ``python tools/gpu_check.py`` or ``tahf4 bench``.

First every kernel against the reference on the device, then speeds beside PyTorch's own, in one process; about five
minutes on an H100. As a script it needs a checkout, PyTorch and Triton, no installation and no diffusers. It ends with
exit code 1 if a kernel is wrong, and times nothing then; or if a whole block is too far from its 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run everything and write ``gpu_<chip>.json`` and ``.md``; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), help="folder for JSON and Markdown")
    parser.add_argument("--tokens", type=int, default=32760, help="rows of the large products")
    parser.add_argument("--only-check", action="store_true", help="no timings")
    chosen = parser.parse_args(arguments)

    import torch
    from tahf4_compiler.backends import triton
    from tahf4_compiler.tools.kernels import measure
    from tahf4_compiler.tools.staging import write_text

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := triton.why_not(device):
        print(f"error: {reason}. This needs an NVIDIA GPU of compute capability 8.0 or above.", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"facts": measure.facts(device), "checks": list(measure.check(device))}
    wrong = [record for record in found["checks"] if not record["ok"]]
    print(f"{len(found['checks']) - len(wrong)} of {len(found['checks'])} checks passed")
    for record in wrong:
        print(f"WRONG {record['name']}: {record['detail']}")
    if not wrong and not chosen.only_check:
        found |= measure.measure(device, tokens=chosen.tokens)
        blocks = measure.judged(found["block"])
        found["checks"] += blocks
        for record in (r for r in blocks if not r["ok"]):
            print(f"WRONG {record['name']}: {record['detail']}")
            wrong.append(record)
    chip = re.sub(r"[^A-Za-z0-9]+", "_", str(found["facts"].get("chip", "cpu"))).strip("_").lower()
    for suffix, text in (("json", json.dumps(found, indent=1) + "\n"), ("md", markdown(found))):
        path = chosen.output / f"gpu_{chip}.{suffix}"
        write_text(path, text)
        print(f"wrote {path}")
    return 1 if wrong else 0


def markdown(found: dict[str, Any]) -> str:
    """Return what was found as a page."""
    facts, wrong = found["facts"], [r for r in found["checks"] if not r["ok"]]
    lines = [
        f"# {facts.get('chip', facts['device'])}",
        "",
        "Made by `python tools/gpu_check.py`; times are medians.",
        "",
    ]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [
        f"{len(found['checks']) - len(wrong)} of {len(found['checks'])} comparisons with the reference passed.",
        "",
    ]
    if "ceilings" not in found:
        return "\n".join([*lines, *(f"- wrong: {r['name']}: {r['detail']}" for r in wrong)]) + "\n"
    ceilings = found["ceilings"]
    lines += [f"Copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s.", ""]
    lines += ["| quantizing | ms | GB/s | of the copy |", "|---|---|---|---|"]
    for row in found["quantize"]:
        lines.append(f"| {row['name']} | {row['ms']:.3f} | {row['gb_s']:.0f} | {row['share_of_copy']:.0%} |")
    lines += ["", "| M, K, N | bf16 ms | fp8 ms | packed | int8 | bf16 path | default | speedup | with quantization |"]
    lines.append("|---" * 9 + "|")
    for row in found["linear"]:
        cells = [f"{row[c]:.3f}" if row.get(c) else "" for c in ("bf16_ms", "fp8_ms", "packed_ms", "int8_ms")]
        cells += [f"{row['expanded_bf16_ms']:.3f}", f"{row['default_ms']:.3f}", f"{row['speedup']:.2f}x"]
        cells.append(f"{row['speedup_with_quantization']:.2f}x")
        lines.append(f"| {row['m']}, {row['k']}, {row['n']} | " + " | ".join(cells) + " |")
    lines += ["", "By the units that share a level-1 scale:", "", "| M, K, N | ms of |"]
    names = list(found["spans"][0]["linear_ms"])
    lines[-1] += "".join(f" {name} |" for name in names)
    lines.append("|---" * (2 + len(names)) + "|")
    for row in found["spans"]:
        for what in ("linear", "quantize"):
            known = row[f"{what}_ms"]
            times = " | ".join(f"{known[name]:.3f}" if name in known else "" for name in names)
            lines.append(f"| {row['m']}, {row['k']}, {row['n']} | {what} | {times} |")
    attention = found["attention"]
    times = f"{attention['sdpa_ms']:.3f} ms in bfloat16 (SDPA), {attention['int8_ms']:.3f} ms in 8 bits"
    wide = f"{attention['wide_ms']:.3f} ms with values in 16, {attention['wide_speedup']:.2f}x"
    lines += ["", f"Self-attention with its quantization: {times}, {attention['speedup']:.2f}x; {wide}."]
    lines += [
        "",
        "| block | eager ms | torch.compile ms | tahf4 ms | over torch.compile | relative error |",
        "|---" * 6 + "|",
    ]
    for name, row in found["block"].items():
        if "tahf4_ms" in row:
            lines.append(
                f"| {name} | {row['eager_ms']:.2f} | {row['inductor_ms']:.2f} | {row['tahf4_ms']:.2f} | "
                f"{row['speedup_over_compile']:.2f}x | {row['relative_error']:.3f} |"
            )
    lines += ["", f"Weights of the linears: {found['block']['weights']['smaller']:.2f}x smaller.", ""]
    return "\n".join(lines)


def _from_a_checkout() -> None:
    """Make the package importable from a checkout: the folders are installed under other names."""
    root = Path(__file__).resolve().parent.parent
    place = Path(tempfile.mkdtemp(prefix="tahf4_"))
    package = place / "tahf4_compiler"
    package.mkdir()
    for entry in (root / "tahf4_compiler").iterdir():
        os.symlink(entry, package / entry.name)
    for name in ("passes", "backends", "tools"):
        os.symlink(root / name, package / name)
    sys.path.insert(0, str(place))


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this script: its names are those of other packages
    _from_a_checkout()
    sys.exit(main())
