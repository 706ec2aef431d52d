"""Randomized smoothing for any classifier: noise, the sequential test, the engine and its logs.

from bench.smoothing import Protocol, certify, reachable_radii

radii = reachable_radii(step=0.25, sigma=0.5, n=10_000, alpha=0.001)
protocol = Protocol(sigma=0.5, n=10_000, radii=radii, data="my images")
for certificate in certify(classifier, images, labels, ids, protocol, classes=10):
    print(certificate.idx, certificate.predict, certificate.radius)
"""

from bench.smoothing.engine import Certificate, certify
from bench.smoothing.protocol import Protocol, radius_grid, reachable_radii

__all__ = ["Certificate", "Protocol", "certify", "radius_grid", "reachable_radii"]
