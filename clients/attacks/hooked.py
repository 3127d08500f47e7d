"""How an attack takes part in the training of whatever benign client it is built around: through the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fl_sim.layout import Layout
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Fit, Update
from fl_sim.samples import Samples
from fl_sim.training import Fitted, Hook, Objective, cross_entropy


@dataclass(frozen=True)
class HookedFit:
    """A training loop with more hooks after the caller's own, and with the caller's objective changed."""

    fit: Fit
    after_backward: tuple[Hook, ...] = ()
    after_step: tuple[Hook, ...] = ()
    around: Callable[[Objective], Objective] | None = None

    def __call__(
        self,
        model: nn.Module,
        samples: Samples,
        optimizer: Optimizer,
        *,
        epochs: int,
        batch_size: int,
        rng: Generator,
        objective: Objective = cross_entropy,
        after_backward: Iterable[Hook] = (),
        after_step: Iterable[Hook] = (),
        **rest: Any,
    ) -> Fitted:
        return self.fit(
            model,
            samples,
            optimizer,
            epochs=epochs,
            batch_size=batch_size,
            rng=rng,
            objective=objective if self.around is None else self.around(objective),
            after_backward=(*after_backward, *self.after_backward),
            after_step=(*after_step, *self.after_step),
            **rest,
        )


def hooked(
    ctx: ClientContext,
    *,
    after_backward: Sequence[Hook] = (),
    after_step: Sequence[Hook] = (),
    around: Callable[[Objective], Objective] | None = None,
) -> ClientContext:
    """The same context with an attack's hooks in its training loop, so that any client trains with them."""
    return replace(ctx, fit=HookedFit(ctx.fit, tuple(after_backward), tuple(after_step), around))


def honest_update(client: Client, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
    """What this client would send if it were honest, trained on a copy: it costs one benign training."""
    actor: Client = getattr(client, "undefended", client)
    return actor.update(deepcopy(model), samples, ctx)


def within(delta: Tensor, max_norm: float | Tensor, layout: Layout) -> Tensor:
    """A fresh update whose parameters' part is shortened to `max_norm` where it is longer; buffers as they are."""
    scaled = delta.clone()
    moved = scaled[: layout.parameters]
    moved *= (max_norm / moved.norm().clamp(min=1e-12)).clamp(max=1)
    return scaled
