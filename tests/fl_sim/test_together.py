"""Clients trained as one network: each ends where the ordinary loop would have brought it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from toys import seeded, small_model, spotted

from fl_sim.annealing import cosine
from fl_sim.augment import Augment
from fl_sim.models.classifier import Architecture, Classifier, Compute
from fl_sim.models.cnn import Cnn
from fl_sim.models.preact_resnet import preactivation_network
from fl_sim.models.resnet import ResNet18
from fl_sim.models.vgg import Vgg11Bn
from fl_sim.models.vit import VitTiny
from fl_sim.models.wide_resnet import WideResNet
from fl_sim.samples import Samples
from fl_sim.together.choice import Choices, fitting, train_alone
from fl_sim.together.layers import normalised
from fl_sim.together.network import Crowd, unfit
from fl_sim.together.training import Job, likeness, train_together
from fl_sim.training import cross_entropy, decayed, sgd

RAGGED = (20, 8, 3, 1, 16, 17, 9, 20)
"""Batches of 8: whole ones only, a rest, a rest of one that joins, one batch, one sample; and more or fewer steps."""

Make = Callable[[nn.Module], Optimizer]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that compute in float64; else their logits are made float32 at the end."""

    def forward(self: Classifier, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        logits: Tensor = self.body(x.contiguous(memory_format=torch.channels_last) if self.compute.channels_last else x)
        return logits

    monkeypatch.setattr(Classifier, "forward", forward)


def momentum(model: nn.Module) -> Optimizer:
    return sgd(model, 0.1, momentum=0.9, weight_decay=1e-3)


def jobs_of(
    sizes: Sequence[int],
    architecture: Architecture | None = None,
    *,
    shape: tuple[int, int, int] = (2, 8, 8),
    dtype: torch.dtype = torch.float64,
    optimizer: Make = momentum,
    augment: Augment | None = None,
    channels_last: bool = True,
    **how: object,
) -> list[Job]:
    """A client for each size, its samples and draws its own, all starting from the same weights."""
    start = small_model(0, 4, shape, architecture, Compute(channels_last=channels_last)).to(dtype)
    jobs = []
    for place, size in enumerate(sizes):
        rng = seeded(100 + place)
        images = torch.rand(size, *shape, generator=rng, dtype=dtype)
        samples = Samples(images, torch.randint(4, (size,), generator=rng), (augment,) if augment else ())
        model = deepcopy(start)
        job = Job(place, model, samples, optimizer(model), epochs=2, batch_size=8, rng=seeded(place))
        jobs.append(replace(job, **how))  # type: ignore[arg-type]
    return jobs


def state(job: Job) -> dict[str, Tensor]:
    """Everything that training changes, by name."""
    found = dict(job.model.state_dict())
    for at, remembered in enumerate(job.optimizer.state.values()):
        found |= {f"{at}.{name}": value for name, value in remembered.items() if isinstance(value, Tensor)}
    return found | {"draws": job.rng.get_state(), "lr": torch.tensor(job.optimizer.param_groups[0]["lr"])}


def assert_alike(together: Sequence[Job], alone: Sequence[Job], tolerance: float) -> None:
    for left, right in zip(together, alone, strict=True):
        ours, theirs = state(left), state(right)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance, msg=lambda m: f"{m}")


def both(make: Callable[[], list[Job]], tolerance: float = 1e-10) -> None:
    """Train the same jobs together and alone; compare everything, and see that each has moved."""
    together, alone, untouched = make(), make(), make()
    assert len({likeness(job) for job in together}) == 1
    assert likeness(together[0]) is not None
    fitted = train_together(together)
    expected = [train_alone(job) for job in alone]
    assert_alike(together, alone, tolerance)
    assert [each.steps for each in fitted] == [each.steps for each in expected]
    # The sum of an epoch's losses is kept in float32 by both.
    assert [each.loss for each in fitted] == pytest.approx([each.loss for each in expected], rel=1e-6)
    for job, start in zip(together, untouched, strict=True):
        moved = [(p - q).abs().max() for p, q in zip(job.model.parameters(), start.model.parameters(), strict=True)]
        assert max(moved) > 1e-4


class Preact:
    """The pre-activation ResNet, narrow and one block a group."""

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        return preactivation_network(shape[0], 4, (4, 8, 8, 8), 1, classes)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("channels_last", [True, False])
def test_ragged_clients_train_as_they_would_alone(channels_last: bool) -> None:
    """Own sizes, orders and step counts; 1e-10 in float64, batch statistics, momentum and draws included."""
    both(lambda: jobs_of(RAGGED, channels_last=channels_last))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "architecture",
    [
        Cnn(width=3),
        WideResNet(10, 1),
        Preact(),
        pytest.param(ResNet18(), marks=pytest.mark.slow),
        pytest.param(Vgg11Bn(), marks=pytest.mark.slow),
    ],
    ids=["cnn", "wrn", "preact_resnet", "resnet18", "vgg11_bn"],
)
def test_every_network_that_can_be_stacked(architecture: Architecture) -> None:
    """Three clients with different batches: residual blocks, strided and 1×1 convolutions, biases, 1×1 maps."""
    both(lambda: jobs_of((5, 1, 3), architecture, epochs=1, batch_size=4))


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_a_lone_sample_on_a_single_position_is_normalised_as_alone() -> None:
    """It has no variance: its running statistics serve and stay as they are; padded beside others, and by itself."""
    both(lambda: jobs_of((1, 3), Vgg11Bn(), epochs=1))
    both(lambda: jobs_of((1, 1), Vgg11Bn(), epochs=1))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("schedule", [cosine, decayed(0.1, 0.4)], ids=["cosine", "decayed"])
@pytest.mark.parametrize("sizes", [RAGGED, (9, 9, 9)], ids=["own courses", "one course"])
def test_each_client_has_its_own_course_of_the_learning_rate(
    schedule: Callable[[float], float], sizes: tuple[int, ...]
) -> None:
    """The course is over a client's own steps, so at one moment the rates differ; weight decay follows the rate."""
    both(lambda: jobs_of(sizes, schedule=schedule))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: SGD(model.parameters(), lr=0.05),
        lambda model: sgd(model, 0.05, momentum=0.5, nesterov=True),
        lambda model: Adam(model.parameters(), lr=1e-3, weight_decay=1e-2),
        lambda model: AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, amsgrad=True),
    ],
    ids=["sgd", "nesterov", "adam", "adamw"],
)
def test_optimizers_and_what_they_remember(optimizer: Make) -> None:
    """Moments and step counts come back to the clients' own optimisers, for a second training to go on with."""
    both(lambda: jobs_of(RAGGED, optimizer=optimizer, schedule=cosine), tolerance=1e-9)  # Adam divides by small roots


@pytest.mark.usefixtures("double")
def test_augmentation_draws_are_each_clients_own() -> None:
    """Crop, flip and cutout, drawn after each batch's order as the ordinary loop draws them."""
    both(lambda: jobs_of(RAGGED, augment=Augment(crop=2, flip=True, cutout=3)))


@pytest.mark.usefixtures("double")
def test_min_steps_end_within_an_epoch() -> None:
    """Everyone the same number of steps, in epochs of their own length: the loss is that of the part epoch."""
    both(lambda: jobs_of(RAGGED, epochs=0, min_steps=5))


def test_float32_and_bytes_agree_to_rounding() -> None:
    """A few steps in float32 on uint8 images: the order of sums differs, by a few units in the last place."""

    def make() -> list[Job]:
        jobs = jobs_of(RAGGED, dtype=torch.float32, optimizer=lambda model: sgd(model, 0.05))
        bytes_ = [replace(job.samples, images=(job.samples.images * 255).to(torch.uint8)) for job in jobs]
        return [replace(job, samples=samples) for job, samples in zip(jobs, bytes_, strict=True)]

    both(make, tolerance=2e-4)


def test_bfloat16_trains_as_well() -> None:
    """Autocast's products are rough; the losses stay near those of training alone, padding or not."""

    def make() -> list[Job]:
        jobs = jobs_of(RAGGED, dtype=torch.float32, optimizer=lambda model: sgd(model, 0.05))
        for job in jobs:
            assert isinstance(job.model, Classifier)
            job.model.compute = Compute("bfloat16")
        return jobs

    losses = [each.loss for each in train_together(make())]
    assert losses == pytest.approx([train_alone(job).loss for job in make()], rel=0.05)


def test_one_clients_nan_stays_its_own() -> None:
    """A diverged client must not reach its neighbours: their numbers are those of a stack without it."""
    sick = jobs_of((8, 8, 5), dtype=torch.float32)
    sick[1].samples.images.fill_(float("nan"))
    well = jobs_of((8, 8, 5), dtype=torch.float32)
    fitted, expected = train_together(sick), train_together(well)
    assert fitted[1].loss != fitted[1].loss
    assert [fitted[at].loss for at in (0, 2)] == [expected[at].loss for at in (0, 2)]
    for at in (0, 2):
        assert all(
            torch.equal(p, q) for p, q in zip(sick[at].model.parameters(), well[at].model.parameters(), strict=True)
        )


def test_padding_counts_in_no_statistic_and_gets_no_gradient() -> None:
    """Against PyTorch's batch normalisation of the real rows alone, whatever stands in the others."""
    rng = seeded()
    x = torch.randn(5, 6, 3, 3, generator=rng, dtype=torch.float64)
    weight, bias = torch.rand(6, generator=rng, dtype=torch.float64), torch.rand(6, generator=rng, dtype=torch.float64)
    rows = [5, 3]  # two clients of three channels
    valid = torch.zeros(5, 6, dtype=torch.float64)
    valid[: rows[0], :3] = valid[: rows[1], 3:] = 1
    values = valid.sum(0) * 9
    upstream = torch.randn(5, 6, 3, 3, generator=rng, dtype=torch.float64) * valid[:, :, None, None]
    tensors = [each.clone().requires_grad_() for each in (x, weight, bias)]
    out, mean, variance = normalised(*tensors, valid, values, torch.zeros(6), torch.ones(6), 1e-5)
    out.backward(upstream)
    for client, count in enumerate(rows):
        own = slice(3 * client, 3 * client + 3)
        parts = [x[:count, own].clone(), weight[own].clone(), bias[own].clone()]
        real, scale, shift = [each.requires_grad_() for each in parts]
        expected = F.batch_norm(real, None, None, scale, shift, True)
        expected.backward(upstream[:count, own])
        torch.testing.assert_close(out[:count, own], expected)
        torch.testing.assert_close(mean[own], real.mean((0, 2, 3)))
        torch.testing.assert_close(variance[own], real.var((0, 2, 3), correction=0))
        for ours, theirs in zip(tensors, (real, scale, shift), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            found = ours.grad[:count, own] if ours.dim() == 4 else ours.grad[own]
            torch.testing.assert_close(found, theirs.grad)
    assert tensors[0].grad is not None
    assert not tensors[0].grad[rows[1] :, 3:].any()


# What is trained together ---------------------------------------------------------------------------------------------


def test_unlike_jobs_have_another_likeness() -> None:
    """Anything that one stacked step can't do for both."""
    [plain] = jobs_of((9,))
    [same] = jobs_of((30,), epochs=5)  # sizes and steps may differ
    assert likeness(plain) == likeness(same)
    others = [
        jobs_of((9,), batch_size=4),
        jobs_of((9,), optimizer=lambda model: sgd(model, 0.2)),
        jobs_of((9,), optimizer=lambda model: Adam(model.parameters(), lr=0.1)),
        jobs_of((9,), Cnn(width=5)),
        jobs_of((9,), augment=Augment(flip=True)),
        jobs_of((9,), dtype=torch.float32),
        jobs_of((9,), channels_last=False),
    ]
    assert all(likeness(job) not in (None, likeness(plain)) for [job] in others)


def test_what_may_look_at_the_model_trains_alone() -> None:
    """Hooks, objectives and transformations of a client's own see a model that stacked training has not touched yet."""
    alone = [
        {"after_step": (lambda model: None,)},
        {"after_backward": (lambda model: None,)},
        {"after_epoch": (lambda model: None,)},
        {"objective": lambda model, x, y: cross_entropy(model, x, y)},
        {"epochs": 0},
    ]
    for how in alone:
        [job] = jobs_of((9,), **how)
        assert likeness(job) is None, how
    [job] = jobs_of((9,))
    assert likeness(replace(job, samples=job.samples.then(lambda x, y, rng: (x, y)))) is None
    assert likeness(replace(job, optimizer=RMSprop(job.model.parameters()))) is None
    assert likeness(replace(job, optimizer=SGD(list(job.model.parameters())[1:], lr=0.1))) is None
    train_alone(job)  # leaves momentum
    assert likeness(job) is None


class Averaging(nn.Module):
    """Looks across channels, and so across the clients of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out - out.mean(1, keepdim=True)


class Batchwise(Averaging):
    """Looks across the batch, where padding stands."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out - out.mean(0)


class Reshaping(Averaging):
    """Has the shape of one client written into it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out.view(len(x), 4, 8, 8)


class Hidden(Averaging):
    """Clients' channels meet in a branch that is zero at the start, as a residual block's may be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out + self.norm(out.softmax(1))


class Around:
    """A network around one block."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
        return nn.Sequential(deepcopy(self.block), head), ["0"]


def test_networks_that_can_not_be_stacked_are_found() -> None:
    """By their layers, or by trying: a block's own forward pass can't be read."""
    assert unfit(small_model()) is None
    assert "VisionTransformer" in (unfit(small_model(architecture=VitTiny(width=12, depth=3))) or "")
    assert "no classifier" in (unfit(nn.Linear(2, 2)) or "")
    shape = (2, 8, 8)
    for block in (Averaging(), Batchwise(), Reshaping(), Hidden()):
        assert "stacked" in (unfit(small_model(shape=shape, architecture=Around(block))) or ""), block
    plain = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    assert unfit(small_model(shape=shape, architecture=Around(plain))) is None
    frozen = small_model()
    frozen.head.requires_grad_(False)
    assert "frozen" in (unfit(frozen) or "")
    watched = small_model()
    watched.head.register_forward_hook(lambda *_: None)
    assert "hook" in (unfit(watched) or "")
    dropping = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(0.5))
    assert "Dropout" in (unfit(small_model(shape=shape, architecture=Around(dropping))) or "")


def test_a_client_that_is_watched_trains_alone() -> None:
    """Whoever looks on at one client's model is not left out because the first one has nobody."""
    model, samples = small_model(), spotted(8)
    job = Job(0, model, samples, sgd(model, 0.1), epochs=1, batch_size=8, rng=seeded())
    assert likeness(job) is not None
    model.head.register_forward_hook(lambda *_: None)
    assert likeness(job) is None


def test_a_stack_leaves_the_models_alone_until_the_end() -> None:
    """They are read, not shared: a training that fails must leave nothing half done."""
    [first, second] = jobs_of((8, 8))
    models = [job.model for job in (first, second) if isinstance(job.model, Classifier)]
    before = [deepcopy(model.state_dict()) for model in models]
    crowd = Crowd(models)
    with torch.no_grad():
        for parameter in crowd.parameters():
            parameter.add_(1)
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    crowd.hand_back()
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(p, kept[name] + 1) for name, p in model.named_parameters())


# How many -------------------------------------------------------------------------------------------------------------


def test_choices_are_made_once_noted_and_found_again() -> None:
    """Measuring leaves jobs and their draws untouched; a resumed run takes what was noted, and measures nothing."""
    notes: list[dict[str, object]] = []
    jobs, untouched = jobs_of((9, 9, 9, 5)), jobs_of((9, 9, 9, 5))
    kind = likeness(jobs[0])
    choices = Choices("auto", 1, {}, notes.append)
    chosen = choices.clients_of(kind, jobs)
    assert_alike(jobs, untouched, 0)
    assert choices.clients_of(kind, jobs) == chosen
    [noted] = notes
    [entry] = noted.values()
    assert isinstance(entry, dict)
    assert entry["clients"] == chosen
    assert set(entry["seconds"]) == {"1", "4"}
    assert all(seconds > 0 for seconds in entry["seconds"].values())
    other = {name: dict(values, clients=3) for name, values in noted.items()}  # type: ignore[call-overload]
    assert Choices("auto", 1, other, notes.append).clients_of(kind, jobs) == 3
    assert len(notes) == 1
    single = {name: dict(values, clients=1) for name, values in noted.items()}  # type: ignore[call-overload]
    alone = Choices("auto", 1, single, notes.append)
    assert alone.is_alone(kind)  # from the beginning, as in a run that was not interrupted
    assert alone.is_alone(None)
    assert not Choices("auto", 1, other, notes.append).is_alone(kind)
    assert not Choices("auto", 1, {}, notes.append).is_alone(kind)


def test_a_number_is_taken_as_it_is_but_not_for_networks_that_can_not_be_stacked() -> None:
    jobs = jobs_of((9, 9))
    assert Choices(7, 1, {}, lambda _: None).clients_of(likeness(jobs[0]), jobs) == 7
    tokens = jobs_of((9, 9), VitTiny(width=12, depth=3), dtype=torch.float32)
    assert Choices(7, 1, {}, lambda _: None).clients_of(likeness(tokens[0]), tokens) == 1


def test_memory_limits_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the free memory has room for twice as many; none for one means each alone, unmeasured."""
    [job, other] = jobs_of((9, 9))
    free = 10**9
    monkeypatch.setattr("fl_sim.together.choice._free", lambda device: free)
    least = fitting(job)
    assert 100 < least < 10**5
    free *= 2
    assert fitting(job) == pytest.approx(2 * least, abs=1)
    free = 1
    notes: list[dict[str, object]] = []
    assert Choices("auto", 1, {}, notes.append).clients_of(likeness(job), [job, other]) == 1
    assert "memory" in str(notes)
