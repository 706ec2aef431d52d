"""Attacks on smoothed classifiers: PGD on the expected loss, judged by fresh draws.

A certified accuracy bounds robust accuracy from below, images whose answer an attack changes bound
it from above, and a change within a certified radius refutes the certificate (docs/attacks.md).
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bench.backbones import compile_for_inference, set_fused_attention
from bench.config import AttackSettings, Experiment, RemoteSettings
from bench.data import Data, load_data, spread
from bench.errors import BenchError
from bench.files import sha256_file, write_json
from bench.model_folder import check_identity, identity_of, load_classifier, read_spec
from bench.objectives.attack import direction, smoothed_gradient, within
from bench.progress import track
from bench.provenance import pick_device, provenance
from bench.resolution import resized
from bench.smoothing.engine import certify
from bench.smoothing.log import check_log_name, read_own_log, write_log
from bench.smoothing.noise import BLOCK, key_tensor, noise_key, standard_normal
from bench.smoothing.protocol import Protocol
from bench.smoothing.rules import ABSTAIN


@dataclass(frozen=True)
class Attack:
    """What is attacked and how.

    Args:
        answers: the certified network, `(B, C, H, W)` pixels plus noise to `(B, classes)` logits.
        gradients: the network that is differentiated, usually the same in float32.
        classes: number of classes.
        sigma: of the noise that smooths it, in [0, 1] pixels.
        seed: of the noise of attack and prediction, in domains that nothing else draws from.
        data: name of the data set, part of the noise's key.
        settings: steps and draws of the attack, and the prediction that judges it.
        batch_size: noisy images per forward pass of predictions, a multiple of 32.
    """

    answers: nn.Module
    gradients: nn.Module
    classes: int
    sigma: float
    seed: int
    data: str
    settings: AttackSettings
    batch_size: int = 1024

    def points(self, images: Tensor, targets: Tensor, radii: Tensor, ids: list[int]) -> Tensor:
        """Points `(N, C, H, W)` near `images` where the smoothed answer is hardly `targets`.

        They lie in the l2 balls of `radii` `(N,)` but not in [0, 1]: the certificates, and the
        robust accuracy that they bound, are about the whole ball. `ids` key the noise.
        """
        if not radii.any():
            return images
        size = self.settings.batch_size // self.settings.draws
        starts = range(0, len(images), size)
        parts = []
        for start in track(starts, len(starts), "attacking"):
            batch = slice(start, start + size)
            parts.append(self._ascend(images[batch], targets[batch], radii[batch], ids[batch]))
        return torch.cat(parts)

    def _ascend(self, images: Tensor, targets: Tensor, radii: Tensor, ids: list[int]) -> Tensor:
        """One gradient step to the sphere, then projected steps, each under noise of its own."""
        scale = radii[:, None, None, None]
        # In units of the radius, so that one ball serves all images.
        perturbation = torch.zeros_like(images)
        for step in range(self.settings.steps + 1):
            length = 2 / self.settings.steps if step else 1.0
            point, noise = images + scale * perturbation, self._noise(images, ids, step)
            gradient = smoothed_gradient(self.gradients, point, targets, noise)
            perturbation = within(perturbation + length * direction(gradient), 1.0)
        return images + scale * perturbation

    def _noise(self, images: Tensor, ids: list[int], step: int) -> Tensor:
        """Draws `(M, B, C, H, W)` of N(0, sigma^2), for an image the same in every batch."""
        blocks, domain = range(self.settings.draws // BLOCK), f"attack/{step}"
        keys = [noise_key(self.seed, self.data, i, domain, b) for i in ids for b in blocks]
        draws = standard_normal(key_tensor(keys, images.device), images.shape[1:])
        return self.sigma * draws.view(len(ids), -1, *images.shape[1:]).movedim(1, 0)

    def predict(self, points: Tensor, labels: list[int], ids: list[int]) -> list[int]:
        """Answers of the smoothed classifier at `points` `(N, C, H, W)`; -1 abstains."""
        protocol = Protocol(
            sigma=self.sigma,
            mode="predict",
            n=self.settings.n,
            alpha=self.settings.alpha,
            seed=self.seed,
            data=self.data,
            batch_size=self.batch_size,
        )
        found = certify(self.answers, points, labels, ids, protocol, self.classes)
        answers = {certificate.idx: certificate.predict for certificate in found}
        return [answers[idx] for idx in ids]


def attack_certificates(attack: Attack, images: Tensor, log: pd.DataFrame) -> pd.DataFrame:
    """Attack the images of a certification log, at fixed radii and where certificates end.

    At each radius of the settings, from 0 (no attack) until the answer is wrong, the true class
    is at stake, at the certified radius the certified one.

    Args:
        attack: what is attacked and how.
        images: clean images `(N, C, H, W)` of the log's rows, on the networks' device.
        log: columns idx, label, predict (-1: no certificate) and radius.

    Returns:
        A row per attack: `idx, label, certified, certified_radius`, the class `target` that was
        to be changed within l2 `radius`, the `distance` gone, and `predict` there (-1 abstains).

    Raises:
        ValueError: there are not as many images as rows.
    """
    if len(images) != len(log):
        raise ValueError(f"{len(images)} images for a log of {len(log)}: give those of its rows")
    names = {"predict": "certified", "radius": "certified_radius"}
    table = log.reset_index(drop=True)[["idx", "label", *names]].rename(columns=names)
    standing, rows = table, []
    for radius in (0.0, *attack.settings.radii):
        rows.append(
            _attacked(attack, images, standing.assign(target=standing["label"], radius=radius))
        )
        answers = rows[-1]["predict"]
        standing = standing[answers.isin([ABSTAIN]) | (answers == standing["label"])]
    certificates = table[(table["certified"] != ABSTAIN) & (table["certified_radius"] > 0)]
    # The loop had the others, or refuted them on its way.
    right = certificates["certified"] == certificates["label"]
    left = certificates[~(right & certificates["certified_radius"].isin(attack.settings.radii))]
    ends = {"target": left["certified"], "radius": left["certified_radius"]}
    return pd.concat([*rows, _attacked(attack, images, left.assign(**ends))], ignore_index=True)


def _attacked(attack: Attack, images: Tensor, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows`, whose index is a position in `images`, with the attack's distance and its answer."""
    if rows.empty:
        return rows.assign(distance=0.0, predict=ABSTAIN)
    pixels, ids = images[torch.tensor(rows.index)], rows["idx"].tolist()
    targets = torch.tensor(rows["target"].to_numpy(), device=images.device)
    radii = torch.tensor(rows["radius"].to_numpy(), dtype=torch.float32, device=images.device)
    points = attack.points(pixels, targets, radii, ids)
    distance = (points.double() - pixels).flatten(1).norm(dim=1)
    predict = attack.predict(points, rows["label"].tolist(), ids)
    return rows.assign(distance=distance.cpu().numpy(), predict=predict)


def attack_method(
    experiment: Experiment,
    method: str,
    sigma: float,
    seed: int,
    model: Path,
    certificates: Path,
    output: Path,
) -> None:
    """Attack a certified method of an experiment; write the log and its JSON sidecar.

    Args:
        experiment: says how, in its section `attack`.
        method: its name in the experiment file.
        sigma: noise level in [0, 1] pixels.
        seed: of the model and the noise.
        model: the model folder.
        certificates: the certification log of this model.
        output: the log, `.tsv`.

    Raises:
        BenchError: the certificates are not this model's, or it has no gradients.
    """
    begin, settings = time.perf_counter(), experiment.attack_settings
    check_log_name(output)
    spec = read_spec(model)
    data = resized(load_data(experiment.data), spec.noise_size)
    check_identity(model, identity_of(experiment, method, sigma, seed), data)
    names = {"experiment": experiment.name, "method": method, "sigma": sigma, "seed": seed}
    of_the_model = {"model_sha256": spec.answers_sha256, "data_sha256": data.sha256}
    protocol, log = _certified_log(certificates, {**names, **of_the_model})
    log = log.iloc[spread(len(log), settings.images or len(log)).numpy()]
    device = pick_device(experiment.gpus_per_job)
    images = data.test.batch(torch.tensor(log["idx"].to_numpy())).to(device)
    attack = _attack_on(experiment, model, protocol, images, data)
    write_log(attack_certificates(attack, images, log).to_dict("records"), output)
    how = {**names, **of_the_model, **_meaning(settings, protocol), "n_images": len(log)}
    hashes = {"certificates_sha256": sha256_file(certificates), "log_sha256": sha256_file(output)}
    spent = {"seconds": time.perf_counter() - begin, **provenance(device)}
    write_json(output.with_suffix(".json"), {**how, **hashes, **spent})


def _meaning(settings: AttackSettings, protocol: dict[str, Any]) -> dict[str, Any]:
    """Part of the sidecar: the attack, and the protocol of the certificates that it attacks."""
    return {
        "attack": settings.part_of_log,
        "noise_seed": protocol["noise_seed"],
        "noise_resolution": protocol["noise_resolution"],
        "certificate_alpha": protocol["alpha_per_image"],
        "precision": protocol["precision"],
    }


def _certified_log(
    certificates: Path, expected: dict[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """A certification log after its sidecar, which must be of this experiment and model."""
    protocol, log = read_own_log(certificates)
    for key, value in expected.items():
        if protocol.get(key) != value:
            raise BenchError(
                f"{certificates.with_suffix('.json')}: {key} is {protocol.get(key)!r}, this run "
                f"needs {value!r}: certify again or name the right log"
            )
    return protocol, log


def _attack_on(
    experiment: Experiment, model: Path, protocol: dict[str, Any], images: Tensor, data: Data
) -> Attack:
    """The attack on the network that was certified, in the precision that it was certified in."""
    if isinstance(read_spec(model).backbone, RemoteSettings):
        raise BenchError(
            f"{model}: a served model shows no gradients: leave it out of attack.methods"
        )
    gradients = load_classifier(model).requires_grad_(False)
    # As for certification, it is prepared before it is moved: devices round differently.
    answers = copy.deepcopy(gradients).for_inference(protocol["precision"]).to(images.device)
    gradients.to(images.device)
    # On CPUs the fused kernel's backward is slower than plain matrix products.
    set_fused_attention(gradients, images.device.type != "cpu")
    if protocol["compile"] != "none":
        shape = (protocol["batch_size"], *images.shape[1:])
        compile_for_inference(answers, images[:1].expand(shape).clone())
    return Attack(
        answers=answers,
        gradients=gradients,
        classes=data.classes,
        sigma=protocol["sigma"],
        seed=protocol["noise_seed"],
        data=data.name,
        settings=experiment.attack_settings,
        # Certification may have halved its own to fit; another shape would round differently.
        batch_size=protocol["batch_size"],
    )
