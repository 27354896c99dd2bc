#!/usr/bin/env bash
# numpy 2.4.6: the percentiles of 1, 2, …, 100 by the method that only returns values of the sample.
# `np.quantile(range(1, 101), p, method="inverted_cdf")` at p = 0.07, 0.14, 0.28, 0.55, 0.56 and 0.57 is 8, 15, 29, 56, 57
# and 58: one rank too high, because 0.07 * 100 is 7.000000000000001. Where a reference distribution is stored as percentiles
# and the next one is held against it (drift, PSI by deciles of 1,000 or 10,000 values), single places are off by one rank,
# which is a whole class where a feature has few values. Ranks in whole numbers, -(-n * k // 100), are right.
# seen: 2026-11-29: percent: (value of that rank, np.quantile's): {7: (7, 8), 14: (14, 15), 28: (28, 29), 55: (55, 56), 56: (56, 57), 57: (57, 58)}
# seen: 2026-11-29: of 7 zeros and 93 ones the 7th percentile is 1 instead of 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np

values = np.arange(1, 101)
found = np.quantile(values, np.linspace(0, 1, 101), method="inverted_cdf")
exact = values[np.maximum(-(-100 * np.arange(101) // 100), 1) - 1]
wrong = {int(percent): (int(exact[percent]), int(found[percent])) for percent in np.flatnonzero(found != exact)}
print("percent: (value of that rank, np.quantile's):", wrong)
assert wrong == {7: (7, 8), 14: (14, 15), 28: (28, 29), 55: (55, 56), 56: (56, 57), 57: (57, 58)}
few = np.repeat([0, 1], [7, 93])
print("of 7 zeros and 93 ones the 7th percentile is", np.quantile(few, 0.07, method="inverted_cdf"), "instead of 0")
assert np.quantile(few, 0.07, method="inverted_cdf") == 1
PYTHON
