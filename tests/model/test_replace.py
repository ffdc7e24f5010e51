"""Replacement of modules whose places are known, against a search of the whole model."""

import copy
import random

import pytest
import torch
from torch import nn

from zssvd_lightning.model.replace import places_known, replace_module


def tree(seed):
    """A model in which modules are shared, at several depths."""
    rng = random.Random(seed)
    modules = [nn.Linear(2, 2) for _ in range(6)]
    for _ in range(8):
        holder = nn.Sequential(*rng.choices(modules, k=rng.randint(1, 3)))
        holder.empty = None
        modules.append(holder)
    return nn.Sequential(*modules[-3:], modules[2])


def names_of(model):
    """All places of the model, each with the number of the module there."""
    numbers = {}
    return [
        (name, numbers.setdefault(id(module), len(numbers)), type(module).__name__)
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def replaced(model, seed, steps=12):
    """Replace modules at random, some by new ones, some by those of the model, and return the places after each."""
    rng = random.Random(seed)
    seen, gone = [], []
    for _ in range(steps):
        every = list(dict.fromkeys(model.modules()))[1:]
        if not every:
            break
        old = rng.choice([*every, *gone])
        leaves = [module for module in every if not list(module.children()) and module is not old]
        kind = rng.randrange(4)
        if kind == 0:
            new = nn.ReLU()
        elif kind == 1:
            new = nn.Sequential(old, nn.Identity()) if isinstance(old, nn.Linear) else nn.Sequential(nn.Linear(2, 2))
        elif kind == 2 and leaves:
            new = rng.choice(leaves)
        else:
            new = nn.Sequential(*old.children()) if list(old.children()) else nn.Linear(2, 2)
        replace_module(model, old, new)
        gone.append(old)
        seen.append(names_of(model))
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_known_places_are_those_of_a_search(seed):
    torch.manual_seed(0)
    model = tree(seed)
    other = copy.deepcopy(model)
    expected = replaced(model, seed)
    with places_known(other):
        assert replaced(other, seed) == expected


def test_other_models_are_searched():
    known, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    with places_known(known):
        replace_module(other, other[0], new := nn.ReLU())
        replace_module(known, nn.ReLU(), nn.ReLU())  # which is not in it
    assert other[0] is new
    assert isinstance(known[0], nn.Linear)


def test_the_model_is_searched_after_the_context():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError), places_known(model):
        _ = 1 / 0
    model.append(model[0])
    replace_module(model, model[0], new := nn.ReLU())
    assert list(model) == [new, new]
