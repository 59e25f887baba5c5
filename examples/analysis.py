"""A data analysis by code that nobody has read: a file, pandas with live output, and a picture.

Run it with ``make demo``. The code runs in a sandbox; what comes back is what it printed, line by line
while it runs, and its results.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from code_sandboxes import ExecutionResult, OutputMessage, Sandbox

WRITE_DATA = """
import csv, random
random.seed(7)
with open("sales.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["month", "region", "units", "price"])
    for month in range(1, 25):
        for region in ("north", "south", "east", "west"):
            for _ in range(500):
                units, price = random.randint(1, 40) + month, round(random.uniform(5, 25), 2)
                writer.writerow([month, region, units, price])
import os
print(f"wrote sales.csv, {os.path.getsize('sales.csv'):,} bytes")
"""

COMPUTE = """
import time
import pandas as pd
sales = pd.read_csv("sales.csv")
sales["revenue"] = sales.units * sales.price
for region, rows in sales.groupby("region"):
    print(f"{region:>6}: {rows.revenue.sum():>14,.2f} in {len(rows):,} sales")
    time.sleep(0.2)
sales.pivot_table(index="month", columns="region", values="revenue", aggfunc="sum").round().tail(3)
"""

PLOT = """
import matplotlib.pyplot as plt
monthly = sales.pivot_table(index="month", columns="region", values="revenue", aggfunc="sum")
axes = monthly.plot(figsize=(8, 4.5), marker="o", title="Revenue by month and region")
axes.set_ylabel("revenue")
axes.grid(alpha=0.3)
plt.show()
"""

MISTAKE = """
print("this line is kept")
sales.no_such_column.sum()
"""


def main() -> None:
    """Run the analysis and save its picture in ``demo-output/``."""
    output = Path("demo-output")
    with Sandbox.create(timeout=120) as sandbox:
        print(f"{sandbox}\nisolation: {sandbox.info.isolation}\n", flush=True)
        run(sandbox, "write a data file", WRITE_DATA)
        table = run(sandbox, "compute with pandas, live", COMPUTE)
        print(table.text)
        picture = run(sandbox, "draw with matplotlib", PLOT)
        print(f"saved {save_picture(picture, output / 'revenue.png')}")
        failed = sandbox.run_code(MISTAKE)
        print(f"\n== a mistake is a result too\n{failed.stdout}\n{failed.status}: {failed.error}")


def run(sandbox: Sandbox, title: str, code: str) -> ExecutionResult:
    """Run *code*, printing what it prints as it comes."""
    print(f"== {title}", flush=True)
    result = sandbox.run_code(code, on_stdout=show, on_stderr=show).raise_for_status()
    print(f"   ({result.duration:.2f} s)\n")
    return result


def show(message: OutputMessage) -> None:
    print(
        "  |",
        message.line,
        end=message.end or "\n",
        file=sys.stderr if message.error else sys.stdout,
        flush=True,
    )


def save_picture(result: ExecutionResult, path: Path) -> Path:
    png = next(shown.png for shown in result.results if shown.png)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(png))
    return path


if __name__ == "__main__":
    main()
