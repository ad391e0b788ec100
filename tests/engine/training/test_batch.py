"""What the head of a run says of its loss."""

import pytest
from cdpo.engine.training.batch import describe_beta

FLOW = ("model.backbone=sd3",)


@pytest.mark.parametrize(
    ("knobs", "rows"),
    [
        ((*FLOW, "objective.beta=2000"), ["beta"]),
        (FLOW, ["beta", "warning"]),  # the default is for models that predict noise
        ((*FLOW, "objective.type=sft"), []),
        ((), []),
    ],
)
def test_a_beta_above_all_that_are_published_for_flow_models_is_warned_of(tiny_recipe, knobs, rows):
    assert [name for name, _ in describe_beta(tiny_recipe(*knobs), (4, 8, 8))] == rows
