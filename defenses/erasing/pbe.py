"""PBE: periodic backdoor erasing at the server without data (Chen et al., HPCC 2023), and with a clean set.

A student f_S is distilled from the backdoored global model f_T. Its response to patches is held down, at the logits and
at the inner groups (logits alone are said to be unstable), and its attention is kept on the teacher's:
L = T² · KL(f_T(x) ‖ f_S(x)) + λ · (R_logits + mean_l R_l) + attention(f_S, f_T),  R = ‖F_S(x ⊕ p) − F_T(x)‖ / ‖F_T(x)‖.
x comes from a generator G(z) that wants f_T's confident, diverse predictions and running statistics, and a student that
disagrees; the patch p comes from a second generator that wants the largest R_logits of f_T, as a trigger has it. Both
are kept between periods. `pbe_clean` takes x from the clean set instead, whose labels it does not use.

A reconstruction: the abstract names suppression before the softmax and attention alignment, without formula or code.
Ours is all else, after the open data-free codes of that time: patches of 5 pixels at 32×32 (`auto` scales), z of 256,
SGD 0.1, Adam 1e-3 for images, 1e-2 for patches. R is towards f_T(x), not f_S(x): a constant student satisfies that, and
students became constant. The attention weights are a tenth of NAD's, for here the teacher is the backdoored model.
On digits `pbe_clean` erases a patch (ASR 1.00 -> 0.04 to 0.16); `pbe` only weakens it (0.36 to 0.76), ACC 0.96 to 0.97.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam

from defenses.erasing.pbe_generator import ImageGenerator, PatchGenerator, ascend, draw, paste, remembered, to_remember
from defenses.erasing.pbe_pictures import Pictures, blanks, warm, with_statistics
from fl_sim.annealing import Annealed
from fl_sim.attention import attention_loss
from fl_sim.distillation import frozen_copy, softened_kl
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier, initialise, reset_linear
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples


def response(stamped: Tensor, wanted: Tensor) -> Tensor:
    """How far a layer's output on stamped images is from the wanted one: ‖F' − F‖ / ‖F‖, averaged over the batch."""
    wanted = wanted.detach().float().flatten(1)
    gap = (stamped.float().flatten(1) - wanted).square().sum(1)
    length: Tensor = wanted.norm(dim=1) + 1e-6
    return (torch.sqrt(gap + 1e-12) / length).mean()  # the slack: no infinite gradient where the two agree


@dataclass(frozen=True)
class PbeClean(Annealed):
    """Distils the model on the clean set, unlabelled, while holding down the response to trigger-like patches."""

    epochs: int = 10
    min_steps: int = 400
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 1e-4
    student: Literal["model", "new_head", "fresh"] = "model"
    temperature: float = 1.0
    suppression: float = 4.0
    attention: tuple[float, ...] = (0.05, 0.4, 1.6)
    patch_size: int | Literal["auto"] = "auto"
    latent: int = 256
    patch_lr: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(self.suppression >= 0, "suppression", self.suppression, "must be 0 or more")
        usable = bool(self.attention) and all(weight >= 0 for weight in self.attention)
        require(usable, "attention", list(self.attention), "must be a list of one or more numbers, none below 0")
        fits = self.patch_size == "auto" or self.patch_size >= 1
        require(fits, "patch_size", self.patch_size, "must be auto or 1 or more pixels")
        require(self.latent >= 1, "latent", self.latent, "must be 1 or more")
        require(self.patch_lr > 0, "patch_lr", self.patch_lr, "must be above 0")

    def side(self, image: int) -> int:
        """The patch's side on images of this many pixels."""
        return max(2, round(image * 5 / 32)) if self.patch_size == "auto" else self.patch_size

    def check_model(self, model: Classifier) -> None:
        """A patch must fit into the image."""
        image = min(model.shape[1:])
        allowed = f"the images are only {image} pixels wide: must be from 1 to {image}"
        require(self.side(image) <= image, "patch_size", self.patch_size, allowed)

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        return self._distilled(model, clean, PatchGenerator(self.latent, model.shape, ctx.rng), ctx), {}

    def _distilled(
        self,
        model: Classifier,
        samples: Samples,
        patches: PatchGenerator,
        ctx: ServerContext,
        pictures: Pictures | None = None,
        disagreement: float = 0.0,
    ) -> Classifier:
        """The student, trained on the samples or on what `pictures` makes in their place."""
        self.check_model(model)
        teacher, side, rng = frozen_copy(model), self.side(min(model.shape[1:])), ctx.rng
        adversary = Adam(patches.to(ctx.device).parameters(), lr=self.patch_lr)

        def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(student, Classifier)
            if pictures is not None:
                made = draw(pictures.generator, len(x), rng, x.device)
                x = made.detach().requires_grad_()
            logits, taps, gap = with_statistics(teacher, x)
            stamped = paste(x.detach(), draw(patches, len(x), rng, x.device), side, rng)
            ascend(adversary, response(teacher(stamped), logits))
            ours, own = student.with_taps(torch.cat([x, stamped.detach()]))
            if pictures is not None:
                unknown = softened_kl(ours[: len(x)], logits)
                pictures.step(made, x, pictures.loss(logits, gap) - disagreement * unknown)
            plain, seen = zip(*(each.chunk(2) for each in (*own, ours)), strict=True)
            goals = [each.detach() for each in (*taps, logits)]
            responses = torch.stack([response(s, goal) for s, goal in zip(seen, goals, strict=True)])
            loss = softened_kl(plain[-1], goals[-1], self.temperature)
            loss = loss + self.suppression * (responses[-1] + responses[:-1].mean())
            return loss + attention_loss(plain[:-1], goals[:-1], self.attention)

        student = deepcopy(model)
        if self.student == "fresh":
            initialise(student.cpu(), rng)
            student.to(ctx.device)
        elif self.student == "new_head":
            reset_linear(student.head, rng)
        return self.annealed(student, samples, ctx, objective)


@dataclass(frozen=True)
class Pbe(PbeClean):
    """Distils the model on generated images, without data, while holding down the response to trigger-like patches."""

    needs_clean: ClassVar[bool] = False

    augment: bool = False
    generator_lr: float = 1e-3
    warm_up: int = 200
    statistics: float = 10.0
    diversity: float = 1.0
    disagreement: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.generator_lr > 0, "generator_lr", self.generator_lr, "must be above 0")
        require(self.warm_up >= 0, "warm_up", self.warm_up, "must be 0 or more steps")
        for key in ("statistics", "diversity", "disagreement"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        generator = ImageGenerator(self.latent, model.shape, ctx.rng).to(ctx.device)
        patches = PatchGenerator(self.latent, model.shape, ctx.rng)
        adam = Adam(generator.parameters(), lr=self.generator_lr)
        pictures = Pictures(generator, adam, self.statistics, self.diversity)
        blank = blanks(self.batch_size, ctx.device)
        remembered(state, "patches.", patches)
        if not remembered(state, "images.", generator) and self.warm_up:
            warm(pictures, frozen_copy(model), blank, self.warm_up, ctx)
        erased = self._distilled(model, blank, patches, ctx, pictures, self.disagreement)
        return erased, to_remember("images.", generator) | to_remember("patches.", patches)
