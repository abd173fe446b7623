#!/usr/bin/env bash
# What only a GPU can say, in three parts of under 8 minutes each on one H100 or H200. Needs torch 2.11 or newer; no network.
#
#     tests/bench/gpu.sh tests      the tests whose GPU path differs from the CPU's
#     tests/bench/gpu.sh kernels    the kernels beside eager, torch.compile, Liger, quack and Cut Cross-Entropy; AdamW beside torchao
#     tests/bench/gpu.sh train      Qwen2.5-7B and Mistral-7B, full parameters, beside transformers + Liger
#
# A part writes its JSON under OUT (default runs/gpu) after every step, so that a run that is cut off still counts; peers that are
# not installed are named in it.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # the clone need not be installed
limit=(timeout --signal=INT --kill-after=20 470)

# tests.json: what every finished file's report says.
summary() {
    "$python" - "$out" <<'PY'
import glob, json, os, sys
import xml.etree.ElementTree as xml

import torch

suites = [next(xml.parse(path).iter("testsuite")) for path in sorted(glob.glob(f"{sys.argv[1]}/tests-*.xml"))]
results = [
    {"file": case.get("classname"), "test": case.get("name"), "seconds": float(case.get("time")),
     "result": next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")}
    for suite in suites for case in suite.iter("testcase")
]
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
with open(f"{sys.argv[1]}/tests.json.tmp", "w") as file:
    json.dump({"gpu": gpu, "torch": torch.__version__, "tests": results}, file, indent=1)
os.replace(f"{sys.argv[1]}/tests.json.tmp", f"{sys.argv[1]}/tests.json")
PY
}

case ${1:-} in
    tests)
        # Two groups: the first one's results are there before the second begins. Most of the time goes into compiling.
        status=0
        start=$SECONDS
        rm -f "$out"/tests-*.xml
        for group in gpu "attention adamw kernels kernel_ops rms_norm rope cross_entropy linear_cross_entropy providers"; do
            left=$((470 - SECONDS + start))
            ((left > 5)) || { echo "out of time before: $group"; status=1; break; }
            files=()
            for name in $group; do files+=("tests/test_$name.py"); done
            timeout --signal=INT --kill-after=20 "$left" "$python" -m pytest "${files[@]}" -q --no-header --tb=short -rfE \
                --maxprocesses 16 --junit-xml "$out/tests-${group%% *}.xml" || status=1
            summary
        done
        exit "$status"
        ;;
    kernels)
        status=0
        timeout --signal=INT --kill-after=20 340 "$python" -m nanomed.kernels.bench --quick --out "$out/kernels" || status=1
        timeout --signal=INT --kill-after=20 100 "$python" tests/bench/adamw.py --out "$out/adamw.json" || status=1
        exit "$status"
        ;;
    train) "${limit[@]}" "$python" tests/bench/train_gpu.py --out "$out/train.json" "${@:2}" ;;
    *)
        echo "usage: tests/bench/gpu.sh tests|kernels|train" >&2
        exit 2
        ;;
esac
