"""Black box: SPSA against calculus, exact query counts, the guard, a served model as the same."""

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tenacity
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import FastAPI
from safetensors.torch import load_file

from baselines.black_box.prompts import FILTERS, ConstantPrompt, Coordinator, Filter, wiener
from baselines.black_box.search import Prompted, Search, pick_filter, score_loss
from baselines.black_box.settings import BlackBoxSettings
from baselines.black_box.spsa import GradientCorrection, directions, spsa_gradient
from baselines.black_box.train import train_black_box
from baselines.command import BaselineJob
from bench.backbones import create_classifier
from bench.certification import Task, protocol_of, run_task
from bench.config import (
    CertificationSettings,
    RemoteSettings,
    TrainingSettings,
    parse_experiment,
)
from bench.data import ArraySplit, Data
from bench.errors import BenchError
from bench.files import read_json
from bench.jobs import base_identity
from bench.model_folder import load_classifier, save_model, spec_of
from bench.provenance import pick_precision
from bench.remote import (
    BudgetSpent,
    Description,
    Ledger,
    RemoteClassifier,
    RemoteModel,
    WireArray,
    as_scores,
    show,
)
from bench.serving import app_of, create_app
from bench.smoothing import Protocol, certify
from bench.smoothing.voting import vote

AT_ONCE = tenacity.wait_none()


def test_spsa_is_the_gradient_of_a_quadratic_on_average():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator)
    weights, slope = torch.randn(2, 6, generator=generator)
    curvature = matrix @ matrix.T

    def loss(w, pair):
        return float(0.5 * w @ curvature @ w - slope @ w)

    gradient = curvature @ weights - slope
    tolerance = 0.08 * gradient.norm()
    estimate = spsa_gradient(loss, weights, 0.1, 8000, generator)
    assert (estimate - gradient).abs().max() < tolerance
    # Multiplying by the direction instead of dividing shrinks it by E[d^2] = 7/12.
    d = torch.stack([directions(6, generator) for _ in range(8000)])
    wrong = ((d @ gradient)[:, None] * d).mean(0)
    assert (wrong - gradient).abs().max() > tolerance
    assert d.abs().min() >= 0.5
    assert d.abs().max() <= 1


def test_gradient_correction_follows_the_published_formula():
    settings = BlackBoxSettings(momentum=0.9, o=1.0, alpha=0.4, gamma=0.1, c=0.01)
    optimizer, weights = GradientCorrection(settings, 0.1), torch.zeros(1)
    expected = 0.0
    # m = 1, 2.9, 5.61; steps g + 0.9 m.
    for k, (gradient, step) in enumerate([(1.0, 1.9), (2.0, 4.61), (3.0, 8.049)], start=1):
        weights = optimizer.update(weights, torch.tensor([gradient]), k)
        expected -= 0.1 / (k + 1) ** 0.4 * step
        assert weights.item() == pytest.approx(expected, rel=1e-5)
    assert optimizer.perturbation(32) == pytest.approx(0.01 / 2**0.5)


def toy_data(images: int = 32) -> Data:
    """Two classes of flat 8 x 8 images, dark and bright."""
    labels = torch.arange(images) % 2
    pixels = (51 + 153 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    split = ArraySplit(pixels, labels)
    return Data("toy", 2, (1, 8, 8), "hash", split, split, split)


def shifted(threshold: float):
    """A black box that calls an image bright when its mean exceeds `threshold`."""

    def logits(pixels):
        score = 20 * (pixels.mean((1, 2, 3)) - threshold)
        return torch.stack([-score, score], 1)

    return logits


class Recorder:
    """A black box that shows `access` of its logits, keeps the queries and counts them."""

    def __init__(self, logits, access="logits", budget=None):
        self.logits, self.access, self.ledger, self.asked = logits, access, Ledger(budget), []

    def __call__(self, pixels):
        self.ledger.spend(len(pixels))
        self.asked.append(pixels.clone())
        return as_scores(show(self.logits(pixels), self.access), self.access, 2)


def search(box: Recorder, rate: float = 0.03, **settings) -> tuple[Search, Prompted]:
    model = Prompted(ConstantPrompt(1, 8, 8, 0.5), box)
    defaults = {"queries": 2016, "checks": 2, "averages": 2, "access": box.access}
    chosen = BlackBoxSettings.model_validate(defaults | settings)
    training = TrainingSettings(images=1, batch_size=8)
    return Search(model, toy_data(), chosen, training, rate, 0.5, 0), model


@pytest.mark.parametrize("access", ["logits", "probabilities", "top1"])
def test_queries_teach_a_prompt_whatever_is_shown(access):
    box = Recorder(shifted(0.85), access)
    found, _ = search(box, rate=0.01, queries=20_000, averages=1)
    progress = found.run()
    assert progress.checks[0]["validation_accuracy"] < 0.75
    assert progress.best_accuracy > 0.95


def test_the_plan_spends_the_budget_to_the_image_and_never_more():
    box = Recorder(shifted(0.5), budget=2016)
    found, _ = search(box)
    progress = found.run()
    # 3 checks of 32 images, and 60 steps of 2 directions x 2 evaluations x 8 images.
    assert found.steps == 60
    assert box.ledger.spent == sum(map(len, box.asked)) == 3 * 32 + 60 * 2 * 2 * 8 == 2016
    assert progress.images == 60 * 8
    assert [check["step"] for check in progress.checks] == [0, 30, 60]
    starved = Recorder(shifted(0.5), budget=1000)
    found, _ = search(starved)
    assert found.run().ended == "query budget spent"
    assert 1000 - 32 < starved.ledger.spent <= 1000
    with pytest.raises(BenchError, match=r"settings\.queries = 100 .* at least 160"):
        search(Recorder(shifted(0.5)), queries=100)[0].run()


def test_both_evaluations_of_a_pair_see_the_same_noise():
    box = Recorder(shifted(0.5))
    search(box)[0].run()
    first, second, third, fourth = box.asked[1:5]
    for plus, minus in ((first, second), (third, fourth)):
        difference = plus - minus
        assert torch.allclose(difference, difference[:1].expand_as(difference), atol=1e-6)
        assert (difference.abs() >= 0.009).all()
    assert (first - third).std(0).min() > 0.1


def test_a_divergence_goes_back_to_the_best_weights_and_is_recorded():
    found, model = search(Recorder(shifted(0.5)), rate=1e6, queries=4032, checks=8)
    progress = found.run()
    assert progress.checks[0]["validation_accuracy"] == progress.best_accuracy == 1.0
    assert progress.checks[1]["validation_accuracy"] == 0.5
    assert "fell from 1.0 to 0.5" in progress.divergences[0]["reason"]
    assert progress.divergences[0]["learning_rate"] == 5e5
    assert not model.prompt.prompt.any()


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    def broken(pixels):
        # The first call is a check, and each step makes four: these two are in the fifth.
        return shifted(0.85)(pixels) * (float("nan") if len(box.asked) in (20, 21) else 1)

    box = Recorder(broken)
    found, model = search(box, rate=0.003)
    progress = found.run()
    assert [event["reason"] for event in progress.divergences] == ["loss is not finite"]
    assert torch.isfinite(model.prompt.prompt).all()
    assert progress.best_accuracy >= progress.checks[0]["validation_accuracy"]


def test_losses_are_those_of_what_is_shown():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    shown = {a: as_scores(show(logits, a), a, 3) for a in ("logits", "probabilities", "top1")}
    expected = F.cross_entropy(logits, labels)
    assert torch.isclose(score_loss(shown["logits"], labels, "logits"), expected)
    assert torch.isclose(score_loss(shown["probabilities"], labels, "probabilities"), expected)
    wrong = (logits.argmax(1) != labels).float().mean()
    assert torch.isclose(score_loss(shown["top1"], labels, "top1"), wrong)


def test_the_coordinator_starts_as_the_identity_with_decorrelated_maps():
    noisy = torch.rand(64, 1, 28, 28) + 0.5 * torch.randn(64, 1, 28, 28)
    coordinator = Coordinator(1, 28, 28, 0.5)
    coordinator.calibrate(noisy)
    assert torch.equal(coordinator(noisy), noisy)
    changes = coordinator.changes(noisy)
    mixed = torch.einsum("ij,bjhw->bihw", coordinator.whitening, changes)
    highest = []
    for maps in (changes, mixed):
        correlation = torch.corrcoef(maps.movedim(1, 0).flatten(1))
        highest.append((correlation - torch.eye(len(correlation))).abs().max())
    assert highest[0] > 0.9
    assert highest[1] < 0.4
    assert torch.allclose(wiener(noisy, 3, 0.0), noisy, atol=1e-5)


def test_the_coordinator_is_whole_on_another_device():
    coordinator = Coordinator(1, 28, 28, 0.5).to("meta")
    assert coordinator(torch.empty(2, 1, 28, 28, device="meta")).is_meta


def test_local_means_and_variances_are_those_of_mirrored_windows():
    planes = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    windows = F.unfold(F.pad(planes, (2, 2, 2, 2), mode="reflect"), 5).view(2, 25, 6, 6)
    mean, variance = windows.mean(1, keepdim=True), windows.var(1, keepdim=True, correction=0)
    expected = mean + (1 - 0.04 / variance).clamp(min=0) * (planes - mean)
    torch.testing.assert_close(wiener(planes, 5, 0.2), expected)


@contextmanager
def served(app) -> Iterator[str]:
    """The address of a uvicorn that runs `app` on this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_every_bit_survives_the_wire():
    bits = torch.tensor([0, -(2**31), 1, 0x7FC00001, 0x7F800000, 0x3F800001], dtype=torch.int32)
    sent = WireArray.of(bits.view(torch.float32)[None])
    received = WireArray.model_validate_json(sent.model_dump_json()).tensor()
    assert torch.equal(received.view(torch.int32), bits[None])
    with pytest.raises(ValueError, match="data must hold 24 bytes"):
        WireArray(dtype="float32", shape=[1, 6], data="AAAA")


class Toy(torch.nn.Module):
    """`shifted(0.5)` as a module, for images 8 x 8."""

    mean = torch.zeros(1)

    def forward(self, pixels):
        return shifted(0.5)(pixels.view(-1, 1, 8, 8))


def toy_app(access="logits", model="toy") -> FastAPI:
    described = Description(model=model, access=access, classes=2, channels=1, max_batch=4)
    return create_app(Toy(), described)


class Faulty:
    """An app before which scripted faults happen, one per question; counts answered images."""

    def __init__(self, app, script):
        self.app, self.script, self.answered = app, list(script), 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/answers" or not self.script:
            return await self.app(scope, receive, send)
        return await getattr(self, self.script.pop(0))(scope, receive, send)

    async def reply(self, send, status, body, length=None):
        size = str(len(body) if length is None else length).encode()
        head = {"type": "http.response.start", "status": status}
        await send({**head, "headers": [(b"content-length", size)]})
        await send({"type": "http.response.body", "body": body})

    async def busy(self, scope, receive, send):
        await self.reply(send, 503, b"")

    async def broken(self, scope, receive, send):
        await self.reply(send, 500, b"")

    async def garbled(self, scope, receive, send):
        await self.reply(send, 200, b'{"answers": ')

    async def part(self, scope, receive, send):
        answer = {"model": "toy", "answers": WireArray.of(torch.zeros(1, 2)).model_dump()}
        await self.reply(send, 200, json.dumps(answer).encode())

    async def outside(self, scope, receive, send):
        await self.classes(send, [0, 1, 2, 0])

    async def below(self, scope, receive, send):
        await self.classes(send, [0, 1, -5, 0])

    async def classes(self, send, shown):
        answers = WireArray.of(torch.tensor(shown)).model_dump()
        await self.reply(send, 200, json.dumps({"model": "toy", "answers": answers}).encode())

    async def cut(self, scope, receive, send):
        async def shortened(message):
            if message["type"] == "http.response.body":
                message = {**message, "body": message["body"][:10], "more_body": True}
            await send(message)

        await self.app(scope, receive, shortened)

    async def silent(self, scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass


FAULTS = ("busy", "broken", "garbled", "part", "cut", "silent")


def test_failed_requests_are_repeated_and_counted_where_they_may_have_been_answered():
    pixels = torch.rand(6, 1, 8, 8)
    with served(Faulty(toy_app(), FAULTS)) as url:
        settings = RemoteSettings(url=url, timeout=5, attempts=7)
        remote = RemoteModel(settings, wait=AT_ONCE)
        answers = remote(pixels)
    assert torch.equal(answers, shifted(0.5)(pixels))
    # 4 + 2 images; the first 4 were asked 7 times, one of which was refused.
    assert remote.ledger.spent == 6 * 4 + 2


def test_a_class_that_does_not_exist_is_no_answer():
    pixels = torch.rand(4, 1, 8, 8)
    with served(Faulty(toy_app("top1"), ["outside", "below"])) as url:
        remote = RemoteModel(RemoteSettings(url=url), wait=AT_ONCE)
        votes = vote(remote(pixels), 2)
    assert torch.equal(votes, shifted(0.5)(pixels).argmax(1))
    assert remote.ledger.spent == 3 * 4
    assert vote(as_scores(torch.tensor([-5, 1]), "top1", 2), 2).tolist() == [2, 1]


def test_a_server_that_becomes_another_model_ends_the_run():
    class Restarted(Faulty):
        """Fails, as it is started again, and is another model from then on."""

        async def broken(self, scope, receive, send):
            await super().broken(scope, receive, send)
            self.app = toy_app(model="another")

    with served(Restarted(toy_app(), ["broken"])) as url:
        remote = RemoteModel(RemoteSettings(url=url), wait=AT_ONCE)
        with pytest.raises(BenchError, match="serves another model than when this run began"):
            remote(torch.rand(6, 1, 8, 8))


def test_no_number_is_no_class_and_votes_for_nobody():
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 2.0], [1.0, torch.inf]])
    shown = show(logits, "top1")
    assert shown.tolist() == [1, -1, -1]
    scores = as_scores(shown, "top1", 2)
    assert scores[0].tolist() == [0.0, 1.0]
    assert vote(scores, 2).tolist() == [1, 2, 2]


def test_a_dead_server_is_one_error_and_no_query():
    with served(toy_app()) as url:
        remote = RemoteModel(RemoteSettings(url=url, attempts=2), wait=AT_ONCE)
    with pytest.raises(BenchError, match="gave no answer in 2 attempts"):
        remote(torch.rand(3, 1, 8, 8))
    assert remote.ledger.spent == 0
    with pytest.raises(BenchError, match="http://localhost:80a is no address"):
        RemoteModel(RemoteSettings(url="http://localhost:80a"))
    with pytest.raises(BenchError, match="does not describe a model"):
        RemoteModel(RemoteSettings(url=url, attempts=1), wait=AT_ONCE)


def test_retries_stop_at_the_budget():
    with served(Faulty(toy_app(), ["broken"] * 9)) as url:
        remote = RemoteModel(RemoteSettings(url=url, attempts=9), Ledger(10), AT_ONCE)
        with pytest.raises(BudgetSpent):
            remote(torch.rand(4, 1, 8, 8))
    assert remote.ledger.spent == 8


def test_what_does_not_fit_is_refused_in_words():
    with served(toy_app("top1")) as url:
        remote = RemoteModel(RemoteSettings(url=url), wait=AT_ONCE)
        assert remote(torch.ones(2, 1, 8, 8)).tolist() == [[0.0, 1.0]] * 2
        with pytest.raises(BenchError, match="must have 1 channels"):
            remote(torch.rand(2, 3, 8, 8))
        assert remote.ledger.spent == 2
        with pytest.raises(BenchError, match="cannot take images 1 x 4 x 9"):
            remote(torch.rand(2, 1, 4, 9))
        with pytest.raises(BenchError, match="shows top1, but logits is asked for"):
            RemoteModel(RemoteSettings(url=url, access="logits"))
        with pytest.raises(BenchError, match="serves another model"):
            RemoteModel(RemoteSettings(url=url, model="other"))


@pytest.fixture
def job(smoke_values, tmp_path) -> BaselineJob:
    """A tiny job on random images, its base random but lively."""
    values = json.loads(json.dumps(smoke_values))
    settings = {"queries": 1280, "checks": 4, "averages": 1}
    values["methods"]["black_box"] |= {"settings": settings, "training": {"batch_size": 16}}
    experiment = parse_experiment(values, "test")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, 28, 28), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)
    base = create_classifier(experiment.backbone, 10, 1)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # The runner-up on the noisy images of the checks: a start that any prompt can better.
    noise = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = base.eval()(pixels / 255 + 0.5 * noise).topk(2).indices[:, 1]
    split = ArraySplit(pixels, labels)
    data = Data("fashion_mnist", 10, (1, 28, 28), "hash", split, split, split)
    identity = base_identity(experiment)
    spec = spec_of(experiment, data)
    save_model(tmp_path / "base", base, spec, identity, {"training_flops": 0}, {})
    device = torch.device("cpu")
    return BaselineJob(
        experiment, "black_box", 0.5, 0, tmp_path / "local", tmp_path / "base", data, device
    )


def with_settings(job: BaselineJob, output: str, **settings) -> BaselineJob:
    method = job.experiment.methods["black_box"]
    changed = method.model_copy(update={"settings": {**method.settings, **settings}})
    methods = {**job.experiment.methods, "black_box": changed}
    experiment = job.experiment.model_copy(update={"methods": methods})
    fields = {**job.__dict__, "experiment": experiment, "output": job.output.parent / output}
    return BaselineJob(**fields)


def certificates(folder, job: BaselineJob) -> list[tuple[int, float, int]]:
    precision = pick_precision("auto", job.device)
    classifier = load_classifier(folder).for_inference(precision)
    images = job.data.test.batch(torch.arange(4))
    labels = job.data.test.labels[:4].tolist()
    protocol = Protocol(sigma=0.5, n=64, n0=32, seed=0, data="toy", batch_size=64, mode="cohen")
    found = certify(classifier, images, labels, [0, 1, 2, 3], protocol, 10)
    return sorted((c.idx, c.predict, c.n_a) for c in found)


def test_a_server_whose_answers_may_differ_is_another_model(job, monkeypatch):
    def identity(access="logits", precision="float32", max_batch=1024):
        with served(app_of(job.base_folder, access, precision, max_batch)) as url:
            described = RemoteModel(RemoteSettings(url=url), wait=AT_ONCE).description
        assert described.max_batch == max_batch
        return described.model

    plain = identity()
    assert identity() == plain
    others = [identity("probabilities"), identity("top1"), identity(precision="bfloat16")]
    others.append(identity(max_batch=8))
    parts = {"code_sha256": lambda files: "", "versions": dict, "machine": lambda device: ""}
    for name, another in parts.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"bench.serving.{name}", another)
            others.append(identity())
    assert len({plain, *others}) == 8


def test_the_precision_of_a_served_network_is_not_known_here(tmp_path):
    settings = CertificationSettings(n=64, mode="cohen", batch_size=64, test_images=2)
    test = ArraySplit(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    protocol, names = protocol_of(settings, "toy", 0.5, 0, 0.25, 2), {"sigma": 0.5}
    with served(toy_app()) as url:
        classifier = RemoteClassifier(RemoteModel(RemoteSettings(url=url), wait=AT_ONCE)).eval()
        identity = ("m", test, 2, "d", torch.arange(2))
        run_task(Task(classifier, *identity, protocol, settings, names), tmp_path / "log.tsv")
    assert read_json(tmp_path / "log.json")["precision"] == "served"


def test_training_against_a_server_is_training_against_the_folder(job):
    train_black_box(job)
    with served(app_of(job.base_folder, "logits", "auto")) as url:
        remote = with_settings(job, "remote", url=url)
        train_black_box(remote)
        local, far = (load_file(j.output / "model.safetensors") for j in (job, remote))
        trained = [name for name in far if name.startswith("denoiser.decoder")]
        assert set(far) < set(local)
        assert all(torch.equal(far[name], local[name]) for name in far)
        assert any(far[name].any() for name in trained)
        assert certificates(remote.output, job) == certificates(job.output, job)
    for output in (job.output, remote.output):
        # 5 checks of 64 images, and 30 steps of 2 x 16.
        assert read_json(output / "cost.json")["queries"] == 5 * 64 + 30 * 32 == 1280
    reports = [read_json(j.output / "training.json") for j in (job, remote)]
    for key in ("loss_curve", "checks", "divergences", "ended"):
        assert reports[0][key] == reports[1][key]


def test_the_folder_holds_the_prompted_black_box(job):
    train_black_box(job)
    base, prompted = load_classifier(job.base_folder), load_classifier(job.output)
    noisy = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(prompted(noisy), base(prompted.denoiser(noisy)))
    constant = with_settings(job, "constant", prompt="constant", access="top1", draws=2)
    train_black_box(constant)
    assert load_classifier(constant.output).denoiser.prompt.shape == (1, 28, 28)
    cost = read_json(constant.output / "cost.json")
    assert cost["trainable_parameters"] == 28 * 28
    assert cost["queries"] == 5 * 64 + 15 * 2 * 32


def test_a_filter_is_chosen_by_validation_accuracy_alone(job):
    point = job.experiment.methods["black_box"]
    settings = {"prompt": "filter", "queries": len(FILTERS) * 64}
    untrained = point.model_copy(update={"settings": settings, "learning_rate": None})
    experiment = job.experiment.model_copy(
        update={"methods": {**job.experiment.methods, "black_box": untrained}}
    )
    filtered = BaselineJob(**{**job.__dict__, "experiment": experiment})
    train_black_box(filtered)
    base, model = load_classifier(job.base_folder), load_classifier(job.output)
    checks = read_json(job.output / "training.json")["checks"]
    assert [check["filter"] for check in checks] == FILTERS
    noise = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noisy = job.data.validation.batch(torch.arange(64)) + 0.5 * noise
    right = [
        (base(Filter(1, 28, 28, 0.5, choice)(noisy)).argmax(1) == job.data.validation.labels)
        for choice in range(len(FILTERS))
    ]
    shares = [float(row.float().mean()) for row in right]
    assert [check["validation_accuracy"] for check in checks] == pytest.approx(shares)
    assert len(set(shares)) > 1
    assert model.denoiser.choice == shares.index(max(shares))
    cost = read_json(job.output / "cost.json")
    assert cost["trainable_parameters"] == 0
    assert cost["queries"] == len(FILTERS) * 64
    with pytest.raises(BenchError, match="give at least 448"):
        train_black_box(with_settings(filtered, "short", queries=447))
    with pytest.raises(BenchError, match=r"settings\.draws: a filter is not searched for"):
        train_black_box(with_settings(filtered, "searched", draws=2))


def test_repeated_requests_leave_the_best_of_the_filters_that_were_paid_for():
    split = ArraySplit(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.ones(4, dtype=torch.int64))
    data = Data("toy", 2, (1, 8, 8), "d", split, split, split)
    ledger, settings = Ledger(3), BlackBoxSettings(prompt="filter", queries=12)

    def ask(pixels):
        ledger.spend(len(pixels))
        return torch.stack([-pixels.mean((1, 2, 3)), pixels.mean((1, 2, 3))], 1)

    class Shift(torch.nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = torch.nn.Parameter(torch.tensor(by))

        def forward(self, noisy):
            return noisy + self.by

    filters = {str(by): Shift(by) for by in (-9.0, 9.0, 8.0)}
    model = Prompted(torch.nn.Identity(), ask)
    with pytest.raises(BenchError, match="not one filter was checked"):
        pick_filter(model, filters, data, settings, 0.1, 0)  # each check takes 4 of 3
    ledger.budget, ledger.spent = 11, 0
    chosen, progress = pick_filter(model, filters, data, settings, 0.1, 0)
    assert (chosen, len(progress.checks), progress.ended) == ("9.0", 2, "query budget spent")
    assert model.prompt is filters["9.0"]


@pytest.mark.parametrize(
    ("prompt", "rate", "complaint"),
    [("filter", 0.1, "chosen, not trained"), ("constant", None, "learning_rate is missing")],
)
def test_a_learning_rate_goes_with_what_is_trained(smoke_values, prompt, rate, complaint):
    values = copy.deepcopy(smoke_values)
    values["methods"]["black_box"] |= {"learning_rate": rate, "settings": {"prompt": prompt}}
    experiment = parse_experiment(values, "test")
    with pytest.raises(BenchError, match=complaint):
        BlackBoxSettings.check(experiment)


def test_filters_are_the_encoders():
    torch.manual_seed(0)
    noisy = torch.randn(2, 3, 9, 9)
    changes = Coordinator(3, 9, 9, 0.5).changes(noisy).view(2, 3, len(FILTERS), 9, 9)
    for choice in range(len(FILTERS)):
        filtered = Filter(3, 9, 9, 0.5, choice)(noisy)
        assert torch.allclose(filtered, noisy + changes[:, :, choice], atol=1e-6)
