#!/usr/bin/env bash
# All figures that need a GPU, in one run on one machine: first the tests of what only a GPU runs, then the comparisons.
#
#     benchmarks/gpu.sh "python PATH/TO/step.py" [PYTHON]
#
# The first argument starts a peer's step: `… dinov2 vit_small 128` (or dinov3, vit_base, vit_large and a batch) must
# print a line `RESULT {"img_s": …, "peak_gib": …}`. PYTHON has opsin and its test extra; .venv/bin/python by default.
# Results go to runs/benchmarks. One part can be run alone: PARTS="tests step input features growth" names those to run.
set -euo pipefail
cd "$(dirname "$0")/.."
peer=${1:?"give the command that starts a peer, see the head of this file"}
python=${2:-.venv/bin/python}
parts=${PARTS:-tests step input features growth}
mkdir -p runs/benchmarks

for part in $parts; do
    echo "== $part =="
    case $part in
    tests)
        "$python" -m pytest -q -m gpu tests
        ;;
    step)
        "$python" benchmarks/peers.py --rounds 3 \
            --peer-command "$peer dinov2 vit_small 128" "--backbone dinov2_vits14 --batch 128" \
            --peer-command "$peer dinov3 vit_small 128" "--backbone dinov2_vits14 --batch 128" \
            --peer-command "$peer dinov2 vit_base 64" "--backbone dinov2_vitb14 --batch 64" \
            --peer-command "$peer dinov3 vit_base 64" "--backbone dinov2_vitb14 --batch 64" \
            --peer-command "$peer dinov2 vit_large 64" "--backbone dinov2_vitl14 --batch 64" \
            --peer-command "$peer dinov3 vit_large 64" "--backbone dinov2_vitl14 --batch 64"
        ;;
    input)
        "$python" -m opsin.cli bench input --batch 128 --out runs/benchmarks/bench-input.json
        "$python" benchmarks/input.py
        "$python" benchmarks/end_to_end.py --batch 128
        ;;
    features)
        "$python" benchmarks/features_peers.py --sizes s b l --precision bf16 --batch 256 --compile
        ;;
    growth)
        "$python" benchmarks/growth.py
        ;;
    *)
        echo "there is no part '$part': see the head of this file" >&2
        exit 2
        ;;
    esac
done
