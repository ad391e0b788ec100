"""The table of families: recipes name all of it, and every entry has its code and its classes."""

from __future__ import annotations

from typing import get_args

import diffusers
import pytest
import tiny
from cdpo.engine.models import family_of
from cdpo.engine.recipe import Model
from cdpo.engine.recipe.family import FAMILIES, family_that_reads


def test_recipes_name_what_is_in_the_table_and_tests_have_a_miniature_of_each():
    assert get_args(Model.model_fields["backbone"].annotation) == tuple(FAMILIES)
    assert set(tiny.PIPELINES) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_entry_has_its_code_and_classes_that_diffusers_knows(name):
    family, pipeline = FAMILIES[name], tiny.PIPELINES[name]()
    for of in ("load", "check", "ask", "told"):
        assert callable(getattr(family_of(Model(backbone=name, path="m")), of))
    for known in (*family.pipelines, family.denoiser, family.vae):
        assert hasattr(diffusers, known)
    denoiser = pipeline.transformer if family.is_flow else pipeline.unet
    assert type(denoiser).__name__ == family.denoiser
    assert type(pipeline.vae).__name__ == family.vae
    assert type(pipeline).__name__ in family.pipelines


def test_an_lcm_is_made_of_what_other_families_read():
    assert [family_that_reads(name) for name in FAMILIES["lcm"].pipelines] == ["lcm", "sd", "sdxl"]
    assert family_that_reads(None) is None
