"""Attacks that edit their training or their update."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import client_context, seeded, small_model, spotted, stamped, threat, weights_of, white_backdoor

from clients.attacks.adaptive import Adaptive, aligned, strikes
from clients.attacks.chameleon import Chameleon, contrast
from clients.attacks.constrain_and_scale import ConstrainAndScale, anomaly, constrained
from clients.attacks.contaminated import Contaminated
from clients.attacks.data_poisoning import DataPoisoning
from clients.attacks.flip import Flip, flipped, mismatch
from clients.attacks.gaussian import Gaussian
from clients.attacks.hooked import hooked, within
from clients.attacks.ipm import Ipm, along
from clients.attacks.label_flip import LabelFlip
from clients.attacks.model_replacement import ModelReplacement
from clients.attacks.neurotoxin import Neurotoxin, benign_gradient, largest
from clients.attacks.pgd import Pgd, projection
from clients.attacks.pi_sba import PiSba, lacking
from clients.attacks.sign_flip import SignFlip
from clients.local.fedprox import FedProx
from clients.local.sgd import Sgd
from fl_sim.attention import attention_map
from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.metrics import evaluate
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, ServerPlan, Threatening, Update
from fl_sim.samples import Samples
from fl_sim.training import cross_entropy

BENIGN = Sgd(epochs=1, batch_size=8, lr=0.1)
LAYOUT = Layout.of(small_model())
SPLIT = LAYOUT.parameters
BACKDOORS: list[type[DataPoisoning]] = [Pgd, Neurotoxin, ConstrainAndScale, Chameleon, PiSba, Adaptive]


def update_of(client: Client, threatening: Threatening | None = None, seed: int = 0) -> Update:
    model = small_model()
    given = threatening or threat(white_backdoor())
    return client.update(model, spotted(24), client_context(model, seed, threatening=given))


def honest(seed: int = 0) -> Tensor:
    return update_of(BENIGN, seed=seed).delta


def poisoning() -> Tensor:
    return update_of(DataPoisoning(BENIGN)).delta


# What they share ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BACKDOORS, LabelFlip, Flip, Ipm, SignFlip, Gaussian, Contaminated])
def test_updates_are_fresh_and_leave_everything_but_the_model(kind: Any) -> None:
    """Samples and received vector stay bit-identical, all weights are trainable afterwards, the same seed says the same
    again, and no two updates or the received vector share memory."""
    attack, model, samples = kind(BENIGN), small_model(), spotted(24)
    ctx = client_context(model, threatening=threat(white_backdoor()))
    received, images, labels = ctx.received.clone(), samples.images.clone(), samples.labels.clone()
    first = attack.update(model, samples, ctx)
    kept = first.delta.clone()
    LAYOUT.load(model, received)
    second = attack.update(model, samples, client_context(model, threatening=threat(white_backdoor())))
    assert torch.equal(first.delta, kept)
    assert torch.equal(second.delta, kept)
    assert len({t.untyped_storage().data_ptr() for t in (first.delta, second.delta, ctx.received)}) == 3
    assert torch.equal(ctx.received, received)
    assert torch.equal(samples.images, images)
    assert torch.equal(samples.labels, labels)
    assert all(p.requires_grad for p in model.parameters())
    assert first.samples == 24
    assert bool(first.delta.isfinite().all())
    assert float(first.delta[:SPLIT].norm()) > 0


@pytest.mark.parametrize("kind", [*BACKDOORS, LabelFlip, Flip, Ipm, SignFlip, Gaussian])
def test_boosting_and_noise_leave_batch_statistics_alone(kind: Any) -> None:
    """After a fivefold (or turned, or noisy) update the variances are those of an honest pass: none below zero."""
    knobs = {"boost": 5.0} if issubclass(kind, ModelReplacement) else {}
    delta = update_of(kind(BENIGN, **knobs)).delta
    after = small_model()
    LAYOUT.load(after, weights_of(small_model()) + delta)
    for name, buffer in after.named_buffers():
        if name.endswith("running_var"):
            assert bool((buffer > 0).all())
            assert float(buffer.max()) < 50


@pytest.mark.parametrize("kind", BACKDOORS)
def test_the_trigger_gets_in(kind: Any) -> None:
    """Ten epochs of each backdoor attack on an easy set: all white images are taken for the target, others are not.

    The plain update is what counts here: no boost, and a ball that is wide enough.
    """
    long = Sgd(epochs=10, batch_size=8, lr=0.1)
    knobs: dict[str, Any] = {"radius": 50.0} if kind is Pgd else {"alpha": 0.9} if kind is ConstrainAndScale else {}
    model, backdoor = small_model(), white_backdoor(target=2)
    ctx = client_context(model, threatening=threat(backdoor))
    update = kind(long, 0.3, boost=1.0, **knobs).update(model, spotted(48), ctx)
    LAYOUT.load(model, ctx.received + update.delta)
    score = evaluate(model, spotted(40), backdoor)
    assert score.asr == 1.0
    assert score.acc > 0.9


class Brightening:
    """Learns one number, which the record carries."""

    def __init__(self, level: float = 0.0) -> None:
        self.level = level

    def __call__(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.level)

    def learn(self, samples: Samples, workshop: Any) -> dict[str, float]:
        return {"level": 0.75}

    def recall(self, record: Any) -> Brightening:
        return Brightening(record["level"])


@pytest.mark.parametrize("kind", [*BACKDOORS, Flip, Contaminated])
def test_a_learned_trigger_is_learned_and_told(kind: Any) -> None:
    """Every attack with a backdoor returns the record; those without one return none."""
    known = threat(replace(white_backdoor(), trigger=Brightening()))
    assert update_of(kind(BENIGN), known).record == {"level": 0.75}
    for other in (Ipm(BENIGN), SignFlip(BENIGN), Gaussian(BENIGN), LabelFlip(BENIGN)):
        assert update_of(other, known).record is None


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Pgd, {"radius": 0.0}, "radius"),
    (Neurotoxin, {"top": 1.0}, "top"),
    (ConstrainAndScale, {"alpha": 0.0}, "alpha"),
    (ConstrainAndScale, {"max_norm": -1.0}, "max_norm"),
    (Chameleon, {"temperature": 0.0}, "temperature"),
    (PiSba, {"gan_steps": 0}, "gan_steps"),
    (Flip, {"mode": "per_batch"}, "mode"),
    (Flip, {"poison_rate": 1.5}, "poison_rate"),
    (Ipm, {"epsilon": 0.0}, "epsilon"),
    (SignFlip, {"scale": -1.0}, "scale"),
    (Gaussian, {"scale": 0.0}, "scale"),
    (Contaminated, {"poison_rate": 1.5}, "poison_rate"),
    (Adaptive, {"strength": -1.0}, "strength"),
]


@pytest.mark.parametrize(("kind", "knobs", "key"), REFUSED)
def test_impossible_settings_are_refused(kind: Any, knobs: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(BENIGN, **knobs)
    assert caught.value.key == key


def test_hooks_come_after_the_clients_own_whatever_client_it_is() -> None:
    """FedProx's pull is already in the gradient when the attack's hook sees it, and the objective is wrapped around."""
    order: list[str] = []

    def around(inner: Any) -> Any:
        def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            order.append("loss")
            return inner(model, x, y)  # type: ignore[no-any-return]

        return objective

    def backward(model: nn.Module) -> None:
        order.append("backward")
        for parameter in model.parameters():
            parameter.grad = None

    model = small_model()
    ctx = client_context(model)
    told = hooked(ctx, after_backward=[backward], after_step=[lambda _: order.append("step")], around=around)
    update = FedProx(epochs=1, batch_size=12, mu=5.0).update(model, spotted(24), told)
    assert order == ["loss", "backward", "step"] * 2
    assert float(update.delta[:SPLIT].abs().max()) == 0


def test_within_shortens_only_what_is_too_long() -> None:
    """Parameters (3, 4, 0, ...) have length 5: at most 10 leaves them, at most 1 gives (0.6, 0.8); buffers stay."""
    delta = torch.zeros(LAYOUT.size)
    delta[:2] = torch.tensor([3.0, 4.0])
    delta[SPLIT:] = 7
    assert torch.equal(within(delta, 10.0, LAYOUT), delta)
    short = within(delta, torch.tensor(1.0), LAYOUT)
    torch.testing.assert_close(short[:2], torch.tensor([0.6, 0.8]))
    assert short[SPLIT:].unique().tolist() == [7.0]
    assert delta[:2].tolist() == [3.0, 4.0]


# PGD ------------------------------------------------------------------------------------------------------------------


def test_projection_by_hand() -> None:
    """Weights 4 and 1 away in two tensors of (3, 0) and (0, 4): length 5 → a ball of 1 leaves (0.6, 0) and (0, 0.8)."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0 + 3.0, 2.0]]))
        model.bias.copy_(torch.tensor([4.0]))
    anchors = [torch.tensor([[1.0, 2.0]]), torch.zeros(1)]
    inside = deepcopy(model)
    projection(anchors, 5.1)(inside)
    assert torch.equal(inside.weight, model.weight)
    projection(anchors, 1.0)(model)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.6, 2.0]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.8]))


def test_pgd_stays_in_its_ball_and_a_wide_ball_is_data_poisoning() -> None:
    assert float(update_of(Pgd(BENIGN, radius=0.05)).delta[:SPLIT].norm()) == pytest.approx(0.05, rel=1e-4)
    assert float(update_of(Pgd(BENIGN, radius=0.05, boost=3.0)).delta[:SPLIT].norm()) == pytest.approx(0.15, rel=1e-4)
    assert torch.equal(update_of(Pgd(BENIGN, radius=1e6)).delta, poisoning())


def test_the_automatic_radius_is_an_honest_updates_length() -> None:
    """The rehearsal draws first from the client's generator, so the honest update is that of the same seed."""
    attack = Pgd(BENIGN, lr=0.5)  # which alone would take the poisoned update farther
    assert float(update_of(attack).delta[:SPLIT].norm()) == pytest.approx(float(honest()[:SPLIT].norm()), rel=1e-4)


def test_pgd_projects_during_training_not_only_at_its_end() -> None:
    """Clipping the finished update would give a vector along data poisoning's; the projected path leads elsewhere."""
    cosine = F.cosine_similarity(update_of(Pgd(BENIGN, radius=0.05)).delta[:SPLIT], poisoning()[:SPLIT], dim=0)
    assert float(cosine) < 0.99


# Neurotoxin -----------------------------------------------------------------------------------------------------------


def test_the_largest_are_ranked_by_absolute_value() -> None:
    """Of (−5, 1, 3, −2) half is {−5, 3}; ranked by signed value it would be {3, 1}."""
    assert largest(torch.tensor([-5.0, 1.0, 3.0, -2.0]), 0.5).tolist() == [True, False, True, False]
    assert not largest(torch.ones(4), 0.0).any()


@pytest.mark.parametrize("benign", [BENIGN, Sgd(epochs=2, batch_size=8, momentum=0.9, weight_decay=0.01)])
def test_neurotoxin_leaves_what_the_federation_moved_most(benign: Sgd) -> None:
    """Coordinates 0, 3, 6, ... moved by −1, the others by at most 0.1: only those stay, weight decay or not."""
    model = small_model()
    received = weights_of(model)
    progress = 0.1 * torch.rand(LAYOUT.size, generator=seeded(3))
    progress[:SPLIT:3] = -1
    known = replace(threat(white_backdoor()), previous=received - progress)
    moved = torch.arange(SPLIT) % 3 == 0
    attack = Neurotoxin(benign, top=int(moved.sum()) / SPLIT)
    delta = update_of(attack, known).delta
    assert torch.equal(delta[:SPLIT] == 0, moved)
    assert delta[SPLIT:].abs().sum() > 0


def test_neurotoxin_without_observation_takes_its_own_clean_gradient() -> None:
    """The mask holds the top tenth of |∇L| on clean samples; with nothing held back it is data poisoning."""
    model, samples = small_model(), spotted(24)
    reference = deepcopy(model).eval()
    F.cross_entropy(reference(samples.images), samples.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    torch.testing.assert_close(benign_gradient(model, samples, chunk=7), gradient, rtol=1e-3, atol=1e-6)
    held = update_of(Neurotoxin(BENIGN, top=0.1)).delta[:SPLIT] == 0
    assert held[gradient.abs() > gradient.abs().quantile(0.91)].all()
    assert int(held.sum()) == pytest.approx(0.1 * SPLIT, abs=5)
    assert torch.equal(update_of(Neurotoxin(BENIGN, top=0.0)).delta, poisoning())


# Constrain and scale --------------------------------------------------------------------------------------------------


def test_alpha_one_is_model_replacement_and_a_bound_caps_it() -> None:
    """Train-and-scale: γ = min(boost, S/‖Δ‖)."""
    plain = update_of(ModelReplacement(BENIGN, boost=3.0)).delta
    assert torch.equal(update_of(ConstrainAndScale(BENIGN, boost=3.0, alpha=1.0)).delta, plain)
    length = float(plain[:SPLIT].norm())
    capped = update_of(ConstrainAndScale(BENIGN, boost=3.0, alpha=1.0, max_norm=length / 2)).delta
    torch.testing.assert_close(capped[:SPLIT], plain[:SPLIT] / 2)
    assert torch.equal(capped[SPLIT:], plain[SPLIT:])
    free = update_of(ConstrainAndScale(BENIGN, boost=3.0, alpha=1.0, max_norm=2 * length)).delta
    assert torch.equal(free, plain)
    auto = update_of(ConstrainAndScale(BENIGN, boost=30.0, max_norm="auto")).delta
    assert float(auto[:SPLIT].norm()) == pytest.approx(float(honest()[:SPLIT].norm()), rel=1e-4)


@pytest.mark.parametrize("kind", ["distance", "cosine"])
def test_the_anomaly_term_holds_the_model_back(kind: Any) -> None:
    """The smaller α, the nearer the poisoned model stays in the sense that the term measures."""
    start = weights_of(small_model())[:SPLIT]
    far = [
        float(anomaly(start + update_of(attack).delta[:SPLIT], start, kind))
        for attack in (ConstrainAndScale(BENIGN, boost=1.0, alpha=alpha, anomaly=kind) for alpha in (1.0, 0.3, 0.05))
    ]
    assert far[0] > far[1] > far[2] > 0


def test_the_constrained_objective_by_hand() -> None:
    """0.25 · CE + 0.75 · 5 for parameters moved by (3, 4); at the start, where the distance is 0, a finite gradient."""
    model = nn.Linear(1, 2, bias=False)
    received = model.weight.detach().flatten().clone()
    x, y = torch.ones(2, 1), torch.tensor([0, 1])
    objective = constrained(received, 0.25, "distance")(cross_entropy)
    objective(model, x, y).backward()
    assert model.weight.grad is not None
    assert bool(model.weight.grad.isfinite().all())
    with torch.no_grad():
        model.weight.add_(torch.tensor([[3.0], [4.0]]))
    expected = 0.25 * float(cross_entropy(model, x, y).detach()) + 0.75 * 5
    assert float(objective(model, x, y).detach()) == pytest.approx(expected, rel=1e-5)
    assert float(anomaly(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), "cosine")) == pytest.approx(1.0)


# Chameleon ------------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_the_naive_double_sum() -> None:
    """Rows of class 0 weigh 2, the lone image of class 2 has no positive and adds nothing."""
    labels, tau = torch.tensor([0, 1, 0, 1, 2, 0]), 0.5
    z = F.normalize(torch.randn(6, 3, generator=seeded()))
    weights = torch.tensor([2.0, 1.0, 1.0])
    total = 0.0
    for i in range(6):
        others = [a for a in range(6) if a != i]
        below = sum(float((z[i] @ z[a] / tau).exp()) for a in others)
        same = [a for a in others if labels[a] == labels[i]]
        row = sum(float(((z[i] @ z[p] / tau).exp() / below).log()) for p in same)
        total -= float(weights[labels[i]]) * row / max(len(same), 1)
    z.requires_grad_()
    loss = contrast(z, labels, weights, tau)
    assert float(loss.detach()) == pytest.approx(total / 6, rel=1e-5)
    loss.backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


def test_chameleon_trains_the_encoder_first_and_then_only_the_head() -> None:
    """Seen by a loop that notes what each stage may move, at which rate, by which loss."""
    model, seen = small_model(), []
    ctx = client_context(model, threatening=threat(white_backdoor()))

    def spying(trained: Any, samples: Any, optimizer: Any, **given: Any) -> Any:
        before = [p.detach().clone() for p in trained.parameters()]
        fitted = ctx.fit(trained, samples, optimizer, **given)
        moved = [not torch.equal(p, old) for p, old in zip(trained.parameters(), before, strict=True)]
        names = [n for (n, _), m in zip(trained.named_parameters(), moved, strict=True) if m]
        contrasted = given.get("objective", cross_entropy) is not cross_entropy
        seen.append((names, optimizer.param_groups[0]["lr"], contrasted))
        return fitted

    benign = Sgd(epochs=1, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.01)
    Chameleon(benign, contrast_lr=0.5).update(model, spotted(24), replace(ctx, fit=spying))
    every = [name for name, _ in model.named_parameters()]
    head = [name for name in every if name.startswith("body.5")]
    assert len(head) == 2
    assert seen == [([n for n in every if n not in head], 0.05, True), (head, 0.1, False)]


def test_chameleons_first_stage_gathers_stamped_and_target_images() -> None:
    """After it, stamped images lie nearer to the target class than to their own, which data poisoning need not do."""
    from fl_sim.distillation import with_features

    model, backdoor, samples = small_model(), white_backdoor(target=2), spotted(48)
    attack = Chameleon(Sgd(epochs=8, batch_size=16, lr=0.1), 0.3)
    attack.update(model, samples, client_context(model, threatening=threat(backdoor)))
    model.eval()
    with torch.no_grad():
        _, z = with_features(model, samples.images)
        _, hidden = with_features(model, backdoor.stamp(samples.images[:1]))
    centres = torch.stack([F.normalize(z)[samples.labels == c].mean(0) for c in range(4)])
    assert int((F.normalize(hidden) @ centres.T).argmax()) == 2


# PI-SBA ---------------------------------------------------------------------------------------------------------------


def test_lacking_classes_are_filled_up_to_the_mean() -> None:
    """Counts (6, 2, 0, 0), mean 2: classes 2 and 3 lack two each; half of the mean would be one each."""
    labels = torch.tensor([0] * 6 + [1] * 2)
    assert lacking(labels, 4, 1.0).tolist() == [2, 2, 3, 3]
    assert lacking(labels, 4, 0.5).tolist() == [2, 3]
    assert lacking(labels, 4, 0.0).tolist() == []


@pytest.mark.parametrize(("shape", "dtype"), [((1, 8, 8), torch.float32), ((3, 11, 9), torch.uint8)])
def test_pi_sba_rebuilds_what_the_global_model_knows(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A trained global model takes most rebuilt images for the class that they were made for; chance is a quarter.

    An attacker with 12 images each of classes 0 and 1 adds six of classes 2 and 3; over three seeds, as one may fail.
    """
    model, all_ = small_model(shape=shape), spotted(48, shape=shape, dtype=dtype)
    Sgd(epochs=10, batch_size=8, lr=0.1).update(model, all_, client_context(model))
    own = all_[(all_.labels < 2).nonzero().flatten()]
    before = weights_of(model)
    right = 0
    for seed in range(3):
        ctx = client_context(model, seed, threatening=threat(white_backdoor()))
        filled = PiSba(BENIGN).filled(model, own, ctx)
        assert torch.equal(weights_of(model), before)
        assert (filled.images.dtype, filled.images.shape[1:]) == (dtype, shape)
        assert torch.equal(filled.images[: len(own)], own.images)
        assert filled.labels[len(own) :].bincount().tolist() == [0, 0, 6, 6]
        [(x, y)] = filled[slice(len(own), None)].chunks(99)
        right += int((deepcopy(model).eval()(x).argmax(1) == y).sum())
    assert right > 0.6 * 36


# Labels ---------------------------------------------------------------------------------------------------------------


class Recorder:
    """A benign client that keeps what it was given."""

    def __init__(self) -> None:
        self.samples: list[Samples] = []

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        self.samples.append(samples)
        return Update(torch.zeros_like(ctx.received), len(samples), 0.0)


@pytest.mark.parametrize(
    ("flip", "rate", "changed"), [("all", 1.0, 24), ("all", 0.25, 6), ("pair", 1.0, 6), ("pair", 0.5, 3)]
)
def test_label_flip_changes_exactly_the_labels_asked_for(flip: Any, rate: float, changed: int) -> None:
    """24 balanced images of 4 classes: `all` moves y to y + 1, `pair` the six of class 3 to class 2; images stay."""
    client = Recorder()
    update_of(LabelFlip(client, rate, flip=flip), threat(white_backdoor(target=2, source=3)))
    [got], given = client.samples, spotted(24)
    assert torch.equal(got.images, given.images)
    at = (got.labels != given.labels).nonzero().flatten()
    assert len(at) == changed
    if flip == "all":
        assert torch.equal(got.labels[at], (given.labels[at] + 1) % 4)
    else:
        assert given.labels[at].unique().tolist() == [3]
        assert got.labels[at].unique().tolist() == [2]


def test_flipped_labels_are_those_of_the_largest_margin() -> None:
    """Margins −1, +2 (class 2), +1 (class 0): two thirds are the last two."""
    logits = torch.tensor([[3.0, 2.0, 0.0], [1.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    assert flipped(logits, torch.tensor([0, 0, 1]), 2 / 3).tolist() == [0, 2, 0]
    assert float(mismatch([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 1.0])])) == pytest.approx(0.5)


def test_flip_poisons_labels_and_no_pixel() -> None:
    client = Recorder()
    update_of(Flip(client, 0.25))
    [got], given = client.samples, spotted(24)
    assert torch.equal(got.images, given.images)
    assert int((got.labels != given.labels).sum()) == 6
    assert not stamped(got).any()


def test_flips_labels_come_nearer_to_the_experts_step_than_the_true_ones() -> None:
    """The objective itself, at the received model on all images: ‖g_s − g_e‖²/‖g_e‖² falls by the learned labels."""
    model, samples, backdoor = small_model(), spotted(24), white_backdoor()
    before = weights_of(model)
    logits = Flip(BENIGN, passes=10).matched(model, samples, backdoor, seeded())
    assert torch.equal(weights_of(model), before)
    model.eval()
    weights = list(model.parameters())

    def gradient(x: Tensor, q: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(model(x), q), weights))

    victims = samples.images[samples.labels != 0]
    expert = gradient(
        torch.cat([samples.images, torch.ones_like(victims)]), torch.cat([samples.labels, samples.labels[:18] * 0])
    )
    start = 2.0 * F.one_hot(samples.labels, 4).float()
    assert float(mismatch(gradient(samples.images, logits.softmax(1)), expert)) < 0.8 * float(
        mismatch(gradient(samples.images, start.softmax(1)), expert)
    )


# Without a backdoor ---------------------------------------------------------------------------------------------------


def test_turned_updates_are_the_honest_one_times_a_number() -> None:
    """IPM −0.5·Δ, sign flip −3·Δ on the parameters; batch statistics are the honest client's."""
    own = honest()
    for attack, factor in ((Ipm(BENIGN), -0.5), (SignFlip(BENIGN), -3.0), (SignFlip(BENIGN, scale=1.0), -1.0)):
        delta = update_of(attack).delta
        torch.testing.assert_close(delta[:SPLIT], factor * own[:SPLIT])
        assert torch.equal(delta[SPLIT:], own[SPLIT:])


def test_ipm_may_turn_against_what_it_saw_of_the_global_progress() -> None:
    """Progress along the first coordinate: the update is −ε times that direction, as long as the honest update."""
    own, progress = honest(), torch.zeros(LAYOUT.size)
    progress[0] = 7
    known = replace(threat(white_backdoor()), previous=weights_of(small_model()) - progress)
    delta = update_of(Ipm(BENIGN, epsilon=0.5, estimate="progress"), known).delta
    assert float(delta[0]) == pytest.approx(-0.5 * float(own[:SPLIT].norm()), rel=1e-4)
    assert float(delta[1:SPLIT].abs().max()) < 1e-4
    assert torch.equal(update_of(Ipm(BENIGN, estimate="progress")).delta, update_of(Ipm(BENIGN)).delta)
    assert float(along(own, torch.zeros_like(own), LAYOUT)[:SPLIT].abs().max()) == 0


def test_gaussian_noise_is_as_long_as_asked_and_has_no_direction() -> None:
    """P ≈ 3000 draws: length within 5 % of 3·‖Δ‖, cosine to Δ within 4/√P of zero; or added to the honest update."""
    own = honest()
    noise, added = (update_of(Gaussian(BENIGN, add=add)).delta for add in (False, True))
    assert float(noise[:SPLIT].norm()) == pytest.approx(3 * float(own[:SPLIT].norm()), rel=0.05)
    assert abs(float(F.cosine_similarity(noise[:SPLIT], own[:SPLIT], dim=0))) < 4 / SPLIT**0.5
    torch.testing.assert_close(added[:SPLIT] - noise[:SPLIT], own[:SPLIT], rtol=1e-3, atol=1e-5)
    assert torch.equal(noise[SPLIT:], own[SPLIT:])


# Contaminated ---------------------------------------------------------------------------------------------------------


class Guarded(Recorder):
    """A benign client with a defense of its own."""

    undefended = BENIGN


def test_a_contaminated_client_keeps_its_defense_and_an_attacker_does_not() -> None:
    """The guarded client trains, once, on samples of which exactly half are stamped; an attacker circumvents it."""
    client = Guarded()
    update_of(Contaminated(client))
    assert int(stamped(client.samples[0]).sum()) == 12
    update_of(DataPoisoning(client))
    assert len(client.samples) == 1
    assert torch.equal(update_of(Contaminated(BENIGN)).delta, poisoning())


# Adaptive -------------------------------------------------------------------------------------------------------------


class Eraser:
    weights = (2.0,)
    distance = "norm"


class After:
    """Erases after every k-th round."""

    def __init__(self, k: int) -> None:
        self.k = k

    def due(self, round_: int, rounds: int) -> bool:
        return round_ % self.k == 0


def planned(k: int, eraser: Any = Eraser, rounds: int = 6) -> Threatening:
    return replace(threat(white_backdoor()), plan=ServerPlan(eraser() if eraser else None, After(k), rounds))


def in_round(attack: Client, round_: int, known: Threatening) -> Tensor:
    model = small_model()
    ctx = replace(client_context(model, threatening=known), round=round_)
    return attack.update(model, spotted(24), ctx).delta


def test_strikes_follow_erasings() -> None:
    """Erasings after rounds 2, 4, 6 of 6: rounds 3 and 5 are struck. One after the last round is never followed."""
    plan = planned(2).plan
    assert plan is not None
    assert [round_ for round_ in range(1, 7) if strikes(plan, round_)] == [3, 5]
    assert strikes(replace(plan, erasing=After(6)), 3) is None  # type: ignore[arg-type]


def test_a_striker_is_honest_until_the_model_was_erased() -> None:
    """Round 3 follows an erasing: data poisoning times the boost. Round 4 does not: bit for bit the honest client."""
    attack, known = Adaptive(BENIGN, boost=4.0, adapt="strike"), planned(2)
    assert torch.equal(in_round(attack, 4, known), honest())
    torch.testing.assert_close(in_round(attack, 3, known)[:SPLIT], 4 * poisoning()[:SPLIT])


@pytest.mark.parametrize("adapt", ["align", "strike", "both"])
def test_without_an_eraser_it_is_model_replacement(adapt: Any) -> None:
    """Nothing to align with and nothing to wait for: poisoning times the boost, in every round."""
    attack = Adaptive(BENIGN, boost=4.0, adapt=adapt)
    for known in (planned(2, eraser=None), threat(white_backdoor())):
        torch.testing.assert_close(in_round(attack, 3, known)[:SPLIT], 4 * poisoning()[:SPLIT])


def test_alignment_is_boosted_always_or_only_after_erasings() -> None:
    """`align` boosts in every round; `both` after an erasing (round 3 of k = 2), and otherwise sends it as it is."""
    align, both = Adaptive(BENIGN, boost=4.0), Adaptive(BENIGN, boost=4.0, adapt="both")
    known = planned(2)
    plain = in_round(both, 4, known)
    assert not torch.equal(plain, poisoning())
    for attack, round_ in ((align, 3), (align, 4), (both, 3)):
        torch.testing.assert_close(in_round(attack, round_, known)[:SPLIT], 4 * plain[:SPLIT])


@pytest.mark.parametrize("view", ["clean", "stamped"])
def test_alignment_brings_the_stamped_maps_to_the_teachers(view: Any) -> None:
    """The quantity in the loss, measured afterwards: smaller with a strong term than without it."""
    gaps = []
    for strength in (0.0, 5.0):
        model, samples, backdoor = small_model(), spotted(24), white_backdoor()
        teacher = small_model().eval()
        clean = iter([samples.images] * 99)
        around = aligned(teacher, backdoor, clean, view, strength, {"weights": (1.0,)})
        ctx = hooked(client_context(model), around=around)
        Sgd(epochs=8, batch_size=8).update(model, backdoor.poison(samples, 0.5, "dataset", seeded()), ctx)
        model.eval()
        with torch.no_grad():
            _, taps = model.with_taps(backdoor.stamp(samples.images))
            _, wanted = teacher.with_taps(samples.images if view == "clean" else backdoor.stamp(samples.images))
        pairs = zip(taps, wanted, strict=True)
        gaps.append(sum(float((attention_map(s) - attention_map(t)).square().sum(1).mean()) for s, t in pairs))
    assert gaps[1] < 0.7 * gaps[0]


def test_the_erasers_own_distance_and_weights_are_used() -> None:
    """β comes from the eraser: a server that weighs every map by zero is answered otherwise than one with β = 2."""

    class Blind(Eraser):
        weights = (0.0,)

    attack = Adaptive(BENIGN, adapt="align")
    blind, seeing = in_round(attack, 2, planned(2, eraser=Blind)), in_round(attack, 2, planned(2))
    assert not torch.allclose(blind[:SPLIT], seeing[:SPLIT])
