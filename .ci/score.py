"Print a run's score beside the baselines, and the paths behind it: .ci/score.py RUN PATH ..."

import csv
import json
import sys
from pathlib import Path

run, *paths = sys.argv[1:]
print("\n" + json.loads(Path(run, "report.json").read_text(encoding="utf-8"))["headline"] + "\n")
with Path(run, "scores.csv").open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
width = max(len(row["prediction"]) for row in rows)
for row in sorted(rows, key=lambda row: -float(row["score"])):
    interval = f"({float(row['low']):.2f} to {float(row['high']):.2f})" if row["low"] else ""
    print(f"  {row['prediction']:{width}}  {float(row['score']):6.2f}  {interval}".rstrip())
print("\nLook at", "\n    and".join(f" {path}" for path in paths), sep="")
