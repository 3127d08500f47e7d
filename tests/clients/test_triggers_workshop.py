"""What triggers make their poisoned images with: only those that say so need a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from fl_sim.backdoor import Backdoor
from fl_sim.build import to_text, world_of
from fl_sim.composing import choices, compose_config, conf_folder
from fl_sim.protocols import Learned, Workshop
from tests.toys import seeded, spotted


def backdoor_of(name: str) -> Backdoor:
    return world_of(to_text(compose_config([f"trigger={name}", "data.subset=0.3"]))).backdoor


@pytest.mark.parametrize("name", choices("trigger", [conf_folder()]))
def test_only_a_trigger_that_says_so_needs_a_model(name: str) -> None:
    """With nothing in the model's place every other trigger poisons all the same, and those that use it can't."""
    backdoor = backdoor_of(name)
    if not backdoor.needs_workshop:
        assert not backdoor.uses_model
        return
    samples = spotted(60, backdoor.classes, (1, 16, 16))
    nothing = cast(Any, None)
    workshop = Workshop(nothing, backdoor.goal, backdoor.classes, seeded(), 0, 1)

    def poison() -> None:
        known, shop = backdoor, workshop
        if isinstance(backdoor.trigger, Learned):
            shop = replace(workshop, record=dict(backdoor.trigger.learn(samples, workshop)))
            known = backdoor.recalling(shop.record)
        known.poison(samples, 0.5, "dataset", seeded(), shop)

    if backdoor.uses_model:
        with pytest.raises((AttributeError, TypeError), match="NoneType"):
            poison()
    else:
        poison()
