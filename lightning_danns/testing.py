"""Assertions for tests of models that obey Dale's principle."""

from torch import nn

from lightning_danns.layers.dale import dale_layers, imbalances, sign_violations


def assert_dale(model: nn.Module) -> None:
    """Assert that ``model`` has signed layers, none of whose weights has the wrong sign or has left its balance.

    Raises:
        AssertionError: names each parameter that is negative or NaN somewhere, with its lowest value; each balanced
            layer whose totals differ, with the highest |S - I| / S of its units; or says that the model holds no
            `DaleModule`, so that there was nothing to assert.
    """
    assert any(True for _ in dale_layers(model)), f"{type(model).__name__} contains no DaleModule"
    violations = sign_violations(model)
    assert not violations, f"weights that must be >= 0 are not (lowest value of each): {violations}"
    lost = imbalances(model)
    assert not lost, f"layers out of balance (highest |excitation - inhibition| / excitation of a unit): {lost}"
