"""Randomized smoothing for any classifier: noise, the sequential test, the engine and its logs.

from dataclasses import asdict
from pathlib import Path
from bench.smoothing import Protocol, certify, reachable_radii
from bench.smoothing.log import write_log

radii = reachable_radii(step=0.25, sigma=0.5, n=10_000, alpha=0.001)
protocol = Protocol(sigma=0.5, n=10_000, radii=radii, data="my images")
certificates = certify(model.eval(), images, labels, ids, protocol, classes=10)
rows = [asdict(certificate) for certificate in certificates]  # idx, predict, radius, ...
write_log(sorted(rows, key=lambda row: row["idx"]), Path("mine.tsv"))

`model` takes images in [0, 1] and normalises them itself; images lie on its device. Then
`bench audit mine.tsv --sigma 0.5 --alpha 0.001 --n 10000` checks the log.
"""

from bench.smoothing.engine import Certificate, certify
from bench.smoothing.protocol import Protocol, radius_grid, reachable_radii

__all__ = ["Certificate", "Protocol", "certify", "radius_grid", "reachable_radii"]
