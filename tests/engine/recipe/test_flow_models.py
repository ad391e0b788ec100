"""Keys of a recipe that mean something for flow models alone, or for others."""

import pytest

FLOW = {"backbone": "sd3", "path": "m"}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"path": "m", "sigmas": "mode"}, {}),
        ({"path": "m"}, {"objective": {"time_weight": "x0"}}),
        (FLOW, {"objective": {"timestep_weighting": "min_snr"}}),
        (FLOW, {"objective": {"type": "consistency_dpo"}}),
        (FLOW, {"export": {"formats": ["diffusers", "kohya"]}}),
        (FLOW | {"teacher": "t"}, {}),
    ],
    ids=str,
)
def test_what_means_nothing_for_a_model_is_refused(problems, model, changes):
    assert problems(model=model, **changes)


def test_what_means_something_is_taken(load):
    recipe = load(model=FLOW | {"sigmas": "uniform"}, objective={"time_weight": "epsilon"})
    assert recipe.model.is_flow and not load().model.is_flow
