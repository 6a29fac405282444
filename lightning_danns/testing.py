"""Assertions for tests of models that obey Dale's principle."""

from torch import nn

from lightning_danns.layers.dale import dale_layers, sign_violations


def assert_dale(model: nn.Module) -> None:
    """Assert that ``model`` has signed layers and that none of their weights has the wrong sign.

    Raises:
        AssertionError: names each parameter that is negative or NaN somewhere, with its lowest value; or says
            that the model holds no `DaleModule`, so that there was nothing to assert.
    """
    assert any(True for _ in dale_layers(model)), f"{type(model).__name__} contains no DaleModule"
    violations = sign_violations(model)
    assert not violations, f"weights that must be >= 0 are not (lowest value of each): {violations}"
